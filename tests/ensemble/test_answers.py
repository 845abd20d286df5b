"""Answers from what members said, without a model: rows with different numbers of choices, both spaces, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax

from pipeline.adapters.members import Member
from pipeline.config import RunConfig
from pipeline.data.rows import Row
from pipeline.ensemble.ensemble import Answer, NumberAnswer, _choices, _numbers, _settled_choices, as_dict, row_of
from pipeline.ensemble.readout import Readout, _margin, top_probability
from pipeline.errors import ConfigError, DataError
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.scores.abstention import Threshold
from pipeline.scores.adaptive import passes_needed

ROWS = [Row("a", "p", ("x", "y", "z")), Row("b", "q", ("x", "y"))]
PROBABILITIES = np.array([[[0.2, 0.3, 0.5], [0.9, 0.1, 0.0]], [[0.6, 0.3, 0.1], [0.7, 0.3, 0.0]]])


def outputs() -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(PROBABILITIES)


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_members_are_averaged_first_and_scaled_then(space: str) -> None:
    readout = Readout((0, 1), space, 2.0, "choice")  # type: ignore[arg-type]
    for n, (row, count) in enumerate(zip(ROWS, (3, 2), strict=True)):
        own = PROBABILITIES[:, n, :count]
        mixed = own.mean(axis=0) if space == "probability" else np.sqrt(own.prod(axis=0))
        expected = mixed**0.5 / (mixed**0.5).sum()
        answer = _choices(outputs(), ROWS, readout, None)[n]
        assert isinstance(answer, Answer) and answer.id == row.id
        assert answer.choice == row.choices[expected.argmax()].strip()
        np.testing.assert_allclose(answer.probabilities, expected, atol=1e-12)
        np.testing.assert_allclose(answer.spread, own.std(axis=0), atol=1e-12)
        assert answer.entropy == pytest.approx(-(expected * np.log(expected)).sum())
        assert "answered" not in as_dict(answer)


def test_rows_are_answered_by_their_confidence_before_scaling() -> None:
    readout = Readout((0, 1), "probability", 2.0, "choice")
    for confidence, expected in ((0.81, [False, False]), (0.79, [False, True]), (0.39, [True, True])):
        threshold = Threshold(confidence, 0.1, 0.95, 100, 50, 1)  # the averages' tops are 0.4 and 0.8
        assert [a.answered for a in _choices(outputs(), ROWS, readout, threshold) if isinstance(a, Answer)] == expected


def test_numbers_are_averaged_and_have_a_spread() -> None:
    values = np.array([[[1.0], [5.0]], [[3.0], [5.0]]])
    found = _numbers(values, ROWS, Readout((0, 1), "value", None, "regression"))
    assert found == [NumberAnswer("a", 2.0, 1.0), NumberAnswer("b", 5.0, 0.0)]
    weighted = _numbers(values, ROWS, Readout((0, None), "value", None, "regression", (0.25, 0.75)))
    assert weighted == [NumberAnswer("a", 2.5, pytest.approx(0.75**0.5)), NumberAnswer("b", 5.0, 0.0)]


def test_weighted_members_count_as_often_as_they_weigh() -> None:
    weighted = Readout((0, 1), "probability", 1.5, "choice", (0.75, 0.25))
    often = Readout((0, 0, 0, 1), "probability", 1.5, "choice")
    found = _choices(outputs(), ROWS, weighted, None)
    for one, other in zip(found, _choices(outputs()[[0, 0, 0, 1]], ROWS, often, None), strict=True):
        assert isinstance(one, Answer) and isinstance(other, Answer) and (one.passes, other.passes) == (2, 4)
        for name in ("probabilities", "entropy", "mutual_information", "spread"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-12)
    assert weighted.identity([], RunConfig()) != replace(weighted, weights=None).identity([], RunConfig())


def test_settled_rows_leave_and_are_answered_as_the_cached_read_out_says() -> None:
    """Rows with three and with two choices; members are asked for what is left alone."""
    random, asked = np.random.default_rng(0), list[tuple[int, int]]()
    rows = [Row(f"r{n}", "p", ("x", "y", "z")[: 3 - n % 2]) for n in range(40)]
    logits = random.exponential(size=(40, 1)) * random.normal(size=(40, 3)) + random.normal(size=(5, 40, 3))
    logits[:, 1::2, 2] = -np.inf
    logs, members = log_softmax(logits, axis=-1), [Member(0, draw) for draw in range(5)]

    def predict(some: Sequence[Row], drawn: Sequence[Member]) -> np.ndarray:
        asked.append((len(some), len(drawn)))
        width = max(len(row.choices) for row in some)
        return logs[np.ix_([m.draw for m in drawn], [int(row.id[1:]) for row in some], range(width))]

    readout = Readout(tuple(range(5)), "probability", 1.5, "choice", margin=0.3)
    answers = _settled_choices(predict, members, rows, readout, Threshold(0.8, 0.1, 0.95, 100, 50, 1))
    expected, passes = np.exp(readout.of(logs)), passes_needed(logs, 0.3)
    top = top_probability(readout.averaged(logs))
    for n, answer in enumerate(answers):
        assert isinstance(answer, Answer) and (answer.id, answer.passes) == (f"r{n}", passes[n])
        np.testing.assert_allclose(answer.probabilities, expected[n, : len(rows[n].choices)], atol=1e-12)
        assert answer.answered == (top[n] >= 0.8)
    assert [members for _, members in asked] == [2, 2, 1]
    assert [count for count, _ in asked] == [40, (passes > 2).sum(), (passes > 4).sum()] and asked[2][0] > 0


@pytest.mark.parametrize("given", ["a text", 3, [("text", "t")]])
def test_a_row_without_columns_is_told_what_rows_are(given: object) -> None:
    with pytest.raises(DataError, match="row 2 = .*is no mapping of columns to values. Give the columns"):
        row_of(given, 2)
    assert row_of({"text": "t"}, 1) == {"text": "t"}


def test_numbers_are_never_settled_and_two_members_have_nothing_to_save() -> None:
    numbers = LabelledSplit(np.zeros((4, 60, 1)), np.zeros(60), None, 1.0, kind="regression", own_space="value")
    with pytest.raises(ConfigError, match=r"ensemble\.adaptive = 0\.05: is for rows with choices"):
        _margin(0.05, numbers, numbers.outputs)
    same = np.broadcast_to(np.log([0.9, 0.1]), (4, 60, 2))
    choices = LabelledSplit(same, np.zeros(60, dtype=int), None, 1.0)
    assert _margin(0.05, choices, same) == 0.0 and _margin(0.0, choices, same) == 1.0
    assert _margin(0.05, choices, same[:2]) is None
