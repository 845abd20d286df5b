"""Members until a row is settled: certainty at margin 1, and that the promised agreement holds on new rows."""

import numpy as np
import pytest
from scipy.special import log_softmax

from pipeline.scores.adaptive import (
    MARGINS,
    ROUND,
    adaptive_average,
    choose_margin,
    passes_needed,
    settled,
)
from pipeline.scores.ensemble import average


def members_of(random, rows, members=8, choices=3, spread=1.0):
    """Rows of which some are clear and some are not; members that differ by `spread`."""
    clear = random.exponential(scale=2.0, size=(rows, 1)) * random.normal(size=(rows, choices))
    return log_softmax(clear + spread * random.normal(size=(members, rows, choices)), axis=-1)


@pytest.mark.parametrize("choices", [2, 5])
def test_with_margin_1_the_answers_are_those_of_all_members(choices):
    logs = members_of(np.random.default_rng(0), 500, choices=choices, spread=3.0)
    passes = passes_needed(logs, 1.0)
    answers = adaptive_average(logs, passes).argmax(axis=-1)
    assert np.array_equal(answers, average(logs).argmax(axis=-1))
    assert set(passes.tolist()) <= {2, 4, 6, 8} and passes.mean() < 8


def test_a_row_is_settled_where_its_lead_outweighs_what_is_left():
    probabilities = np.array([[[0.8, 0.1, 0.1]], [[0.6, 0.4, 0.0]]])  # a lead of 1.4 - 0.5 = 0.9
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities)
    assert settled(logs, 4, 0.22).tolist() == [True] and settled(logs, 4, 0.23).tolist() == [False]
    assert settled(logs, 0, 1.0).tolist() == [True]
    assert settled(logs[..., :1], 6, 1.0).tolist() == [True], "one choice has no other"


def test_what_later_members_say_is_not_looked_at():
    logs = members_of(np.random.default_rng(1), 50)
    passes = passes_needed(logs, 0.2)
    kept, expected = logs.copy(), adaptive_average(logs, passes)
    for row, count in enumerate(passes):
        kept[count:, row] = np.nan
    assert np.array_equal(adaptive_average(kept, passes), expected)
    for row in range(0, 50, 7):
        own = np.log(np.exp(logs[: passes[row], row]).mean(axis=0))
        assert expected[row] == pytest.approx(own)
    assert np.array_equal(adaptive_average(logs, np.full(50, 8)), average(logs))


def test_the_promised_agreement_holds_on_new_rows():
    """Of 80 margins, each chosen on 150 rows, at most about 5 % may change more than 5 % of the answers."""
    random, share, worse, saved = np.random.default_rng(2), 0.05, 0, []
    many = members_of(random, 4_000)
    whole = average(many).argmax(axis=-1)
    changed = {}
    for value in MARGINS:
        answers = adaptive_average(many, passes_needed(many, value)).argmax(axis=-1)
        changed[value] = (answers != whole).mean()
    assert changed[1.0] == 0.0 and changed[0.0] > share, "without a margin too many answers change"
    for _ in range(80):
        margin = choose_margin(many[:, random.integers(4_000, size=150)], share)
        worse += changed[margin] > share
        saved.append(margin)
    assert worse <= 80 * 0.05 + 3 * np.sqrt(80 * 0.05 * 0.95)
    assert passes_needed(many, float(np.median(saved))).mean() < 6.5


def test_too_few_rows_promise_nothing_but_certainty():
    logs = members_of(np.random.default_rng(3), 50, spread=0.1)
    assert choose_margin(logs, 0.05) == 1.0, "59 rows without a change are the least"
    more = members_of(np.random.default_rng(3), 60, spread=0.01)
    assert choose_margin(more, 0.05) < 1.0
    assert choose_margin(more, 0.0) == 1.0


def test_members_come_in_rounds_and_the_last_may_be_short():
    logs = members_of(np.random.default_rng(4), 200, members=5, spread=2.0)
    assert set(passes_needed(logs, 0.5).tolist()) == {ROUND, 2 * ROUND, 5}
    assert passes_needed(logs[:1], 0.5).tolist() == [1] * 200
