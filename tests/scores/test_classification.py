"""Scores against independent implementations, intervals against the truth of a known distribution."""

import numpy as np
import pytest
from helpers.simulated import calibrated
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from pipeline.scores import bootstrap, calibration, classification
from pipeline.scores.bootstrap import RowMean


@pytest.fixture
def random():
    return np.random.default_rng(7)


@pytest.mark.parametrize("choices", [2, 5])
def test_mean_scores_equal_scikit_learn(random, choices):
    log_probs, labels = calibrated(300, choices, random, 2.0)
    names, probabilities = list(range(choices)), np.exp(log_probs)
    assert classification.accuracy(log_probs, labels) == pytest.approx(accuracy_score(labels, probabilities.argmax(1)))
    assert classification.nll(log_probs, labels) == pytest.approx(log_loss(labels, probabilities, labels=names))
    expected = brier_score_loss(labels, probabilities, labels=names, scale_by_half=False)
    assert classification.brier(log_probs, labels) == pytest.approx(expected)


def test_leading_axes_are_other_predictors(random):
    pairs = [calibrated(80, 3, random, s) for s in (0.5, 1.0, 3.0, 4.0)]
    labels = pairs[0][1]
    stack = np.stack([p for p, _ in pairs])
    for name in ("accuracy", "nll", "brier"):
        score = getattr(classification, name)
        one_by_one = [float(score(p, labels)) for p in stack]
        assert score(stack.reshape(2, 2, 80, 3), labels).ravel() == pytest.approx(one_by_one)


def test_choices_that_a_row_lacks_change_nothing(random):
    log_probs, labels = calibrated(60, 3, random)
    padded = np.concatenate([log_probs, np.full((60, 2), -np.inf)], axis=1)
    for score in (classification.accuracy, classification.nll, classification.brier, calibration.ece):
        assert score(padded, labels) == pytest.approx(float(score(log_probs, labels)))


def test_perplexity_is_the_inverse_geometric_mean():
    assert classification.perplexity(np.log([[0.5, 0.125], [1.0, 0.25]])) == pytest.approx([4.0, 2.0])


def test_bootstrap_is_deterministic_and_seeded(random):
    statistic = RowMean(random.normal(size=(1, 50)))
    first, second, other = (bootstrap.bootstrap_interval(statistic, 50, 200, seed) for seed in (0, 0, 1))
    assert first == second
    assert first != other


def test_bootstrap_in_chunks_equals_one_piece(random, monkeypatch):
    statistic = RowMean(random.normal(size=(1, 50)))
    whole = bootstrap.bootstrap([statistic], 50, 500)
    monkeypatch.setattr(bootstrap, "_CHUNK_NUMBERS", 100 * 50)
    assert np.array_equal(bootstrap.bootstrap([statistic], 50, 500), whole)


def test_row_mean_resamples_equal_explicit_resampling(random):
    values, sizes = random.random((1, 30)), random.integers(1, 9, 30).astype(float)
    drawn = random.integers(30, size=(5, 30))
    weights = np.stack([np.bincount(d, minlength=30) for d in drawn]).astype(float)
    expected = [values[0, d].sum() / sizes[d].sum() for d in drawn]
    assert RowMean(values, sizes).resampled(weights) == pytest.approx(expected)
    assert RowMean(values, sizes).point() == pytest.approx(values.sum() / sizes.sum())


def test_interval_of_a_mean_covers_the_truth_95_times_in_100(random):
    hits = 0
    for seed in range(400):
        interval = bootstrap.bootstrap_interval(RowMean(random.exponential(size=(1, 150))), 150, 300, seed)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.90 <= hits / 400 <= 0.985


def test_paired_interval_is_narrower_than_an_unpaired_one(random):
    shared = random.normal(scale=5.0, size=200)
    first, second = RowMean(shared[None] + 0.5 + 0.1 * random.normal(size=200)), RowMean(shared[None])
    paired = bootstrap.paired_difference_interval(first, second, 200, 500)
    alone = bootstrap.bootstrap_interval(first, 200, 500)
    assert paired.excludes_zero and paired.low < 0.5 < paired.high
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_dependent_rows_need_units(random):
    """20 documents of 10 equal rows: resampling rows hides that there are only 20 observations."""
    units = np.repeat(np.arange(20), 10)
    statistic = RowMean(random.normal(size=20)[units][None])
    by_row, by_unit = (bootstrap.bootstrap_interval(statistic, 200, 1000, 0, u) for u in (None, units))
    ratio = (by_unit.high - by_unit.low) / (by_row.high - by_row.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.2)


def test_interchangeable_predictors_widen_the_interval(random):
    rows = random.normal(scale=0.1, size=100)
    draws = RowMean(rows + random.normal(size=(30, 1)))
    one = RowMean(rows[None] + draws.values.mean(axis=0) - rows)
    many, single = (bootstrap.bootstrap_interval(s, 100, 1000) for s in (draws, one))
    assert many.value == pytest.approx(single.value)
    assert many.high - many.low > 10 * (single.high - single.low)
