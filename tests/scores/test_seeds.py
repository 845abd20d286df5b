"""Intervals over seeds and rows: against closed forms, and by simulation against what they promise."""

import numpy as np
import pytest
from scipy import stats

from pipeline.scores.bootstrap import Interval, RowMean, bootstrap
from pipeline.scores.seeds import Runs, difference, within_bounds

ROWS, SAMPLES = 100, 150
MIXES = {"rows": (0.0, 1.0, 0.3), "both": (0.1, 1.0, 0.6), "seeds": (0.3, 0.3, 0.3)}
"""Standard deviations of seeds, rows and their interaction; a mean over 100 rows has a tenth of the latter two."""


def make_runs(values, seeds=None, seed=0, samples=SAMPLES):
    """From (S, N) scores of S seeds on N rows."""
    statistics = [RowMean(row[None]) for row in values]
    table = bootstrap(statistics, values.shape[1], samples, seed).T
    names = tuple(range(len(values))) if seeds is None else seeds
    return Runs(values.mean(axis=1), table, values.shape[1], names)


def draw(seeds, rows, mix, random, mean=0.0):
    of_seed, of_row, both = mix
    return (mean + of_seed * random.normal(size=(seeds, 1)) + of_row * random.normal(size=rows)
            + both * random.normal(size=(seeds, rows)))


def test_one_run_has_the_percentile_interval_of_its_rows():
    runs = make_runs(np.random.default_rng(0).normal(size=(1, 80)))
    low, high = np.quantile(runs.resamples[0], [0.025, 0.975])
    found = runs.interval()
    assert (found.value, found.low, found.high) == pytest.approx((runs.points[0], low, high)) and runs.spread is None


def test_variances_are_those_of_the_analysis_of_variance():
    """Two-way layout without replication: (MS_seeds - MS_rest) / N S and (MS_rows) / S N."""
    values = draw(5, 200, (0.5, 0.7, 0.3), np.random.default_rng(1))
    runs = make_runs(values, samples=6000)
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    mean_square = (rest**2).sum() / (4 * 199)
    between = values.mean(axis=1).var(ddof=1)
    assert runs.seed_variance() == pytest.approx((between - mean_square / 200) / 5, rel=0.01)
    assert runs.row_variance() == pytest.approx(values.mean(axis=0).var(ddof=1) / 200, rel=0.05)
    assert runs.spread == pytest.approx(values.mean(axis=1).std(ddof=1))
    half = stats.t.ppf(0.975, 4) ** 2 * runs.seed_variance() + stats.t.ppf(0.975, 199) ** 2 * runs.row_variance()
    assert runs.interval().high - runs.mean == pytest.approx(half**0.5)


def test_seeds_that_agree_leave_the_interval_of_the_rows():
    row = np.random.default_rng(2).normal(size=200)
    three = make_runs(np.repeat(row[None], 3, axis=0), samples=4000).interval()
    one = make_runs(row[None], samples=4000).interval()
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)


def test_a_system_without_seeds_is_the_same_for_every_seed():
    random = np.random.default_rng(3)
    many, base = draw(4, 60, (0.2, 1.0, 0.1), random), random.normal(size=(1, 60))
    found = difference(make_runs(many), make_runs(base))
    assert found.interval.value == pytest.approx(many.mean() - base.mean()) and found.seeds == 4
    assert found.spread == pytest.approx(many.mean(axis=1).std(ddof=1))


def test_differences_pair_the_seeds_that_both_have():
    random = np.random.default_rng(4)
    common = 3.0 * random.normal(size=(4, 1))  # what a seed does to both methods alike
    first = common + random.normal(size=60) + 0.1 * random.normal(size=(4, 60))
    second = first[1:] - 0.5
    found = difference(make_runs(first, (1, 2, 3, 4)), make_runs(second, (2, 3, 4)))
    assert found.interval.value == pytest.approx(0.5) and found.seeds == 3 and found.claims
    assert found.interval.high - found.interval.low < 0.1, "the seeds' own spread of 3 is in neither"


def test_without_common_seeds_the_variances_add_up():
    random = np.random.default_rng(5)
    first, second = (draw(3, 60, (1.0, 0.1, 0.1), random) for _ in range(2))
    a, b = make_runs(first, (1, 2, 3)), make_runs(second, (4, 5, 6))
    found = difference(a, b)
    least = stats.t.ppf(0.975, 2) * (a.seed_variance() + b.seed_variance()) ** 0.5
    assert found.interval.value == pytest.approx(first.mean() - second.mean()) and found.spread is None
    assert found.interval.high - found.interval.value == pytest.approx(least, rel=0.05)


def test_two_seeds_make_no_claim_and_three_may():
    values = 5.0 + 0.01 * np.random.default_rng(6).normal(size=(3, 50))
    zero = make_runs(np.zeros((1, 50)))
    two, three = (difference(make_runs(values[:count]), zero) for count in (2, 3))
    assert two.interval.excludes_zero and not two.claims and three.claims


def test_intervals_stay_within_the_range_of_a_score():
    assert within_bounds(Interval(0.01, -0.02, 1.2), 0.0, 1.0) == Interval(0.01, 0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_over_seeds_hold_their_level(seeds, mix):
    """The difference of two methods, 100 rows; 1000 studies have a standard error of 0.007."""
    random, hits, studies = np.random.default_rng([seeds, *mix.encode()]), 0, 1000
    zero = Runs(np.zeros(1), np.zeros((1, SAMPLES)), ROWS)
    weights = np.random.default_rng(0).multinomial(ROWS, np.full(ROWS, 1 / ROWS), size=(20, SAMPLES)) / ROWS
    for study in range(studies):
        values = draw(seeds, ROWS, MIXES[mix], random)
        runs = Runs(values.mean(axis=1), values @ weights[study % 20].T, ROWS, tuple(range(seeds)))
        interval = difference(runs, zero).interval
        hits += interval.low <= 0.0 <= interval.high
    assert 0.92 <= hits / studies <= 0.98


@pytest.mark.slow
def test_more_seeds_find_more():
    """A true difference of -0.05 nats on 300 rows, seeds with a standard deviation of 0.05."""
    random, power = np.random.default_rng(1), {}
    weights = np.random.default_rng(0).multinomial(300, np.full(300, 1 / 300), size=(10, SAMPLES)) / 300
    zero = Runs(np.zeros(1), np.zeros((1, SAMPLES)), 300)
    widths = {}
    for seeds in (2, 3, 5, 10):
        found = []
        for study in range(300):
            values = draw(seeds, 300, (0.05, 0.15, 0.15), random, -0.05)
            runs = Runs(values.mean(axis=1), values @ weights[study % 10].T, 300, tuple(range(seeds)))
            found.append(difference(runs, zero))
        power[seeds] = np.mean([one.claims for one in found])
        widths[seeds] = np.median([one.interval.high - one.interval.low for one in found])
    assert power[2] == 0.0 and power[3] < power[5] < power[10] and power[10] > 0.6
    assert widths[2] > widths[3] > widths[5] > widths[10]
