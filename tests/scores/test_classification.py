"""Scores against independent implementations, intervals against the truth of a known distribution."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from pipeline.scores import bootstrap, classification
from pipeline.scores.bootstrap import RowMean
from pipeline.scores.classification import CalibrationError


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def calibrated(rows, choices, random, overconfidence=1.0):
    """Labels drawn from softmax(z); predictions softmax(overconfidence z): (log_probs, labels)."""
    logits = random.normal(scale=1.5, size=(rows, choices))
    truth = np.exp(log_softmax(logits))
    labels = (truth.cumsum(axis=1) < random.random(rows)[:, None]).sum(axis=1).clip(max=choices - 1)
    return log_softmax(overconfidence * logits), labels


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
    for name in ("accuracy", "nll", "brier", "ece", "plugin_ece"):
        score = getattr(classification, name)
        one_by_one = [float(score(p, labels)) for p in stack]
        assert score(stack.reshape(2, 2, 80, 3), labels).ravel() == pytest.approx(one_by_one)


def test_choices_that_a_row_lacks_change_nothing(random):
    log_probs, labels = calibrated(60, 3, random)
    padded = np.concatenate([log_probs, np.full((60, 2), -np.inf)], axis=1)
    for score in (classification.accuracy, classification.nll, classification.brier, classification.ece):
        assert score(padded, labels) == pytest.approx(float(score(log_probs, labels)))


def test_perplexity_is_the_inverse_geometric_mean():
    assert classification.perplexity(np.log([[0.5, 0.125], [1.0, 0.25]])) == pytest.approx([4.0, 2.0])


def test_equal_mass_bins_are_equally_full_and_keep_ties_together(random):
    confidence = random.random(100)
    assert np.bincount(classification.equal_mass_bins(confidence, 10)).tolist() == [10] * 10
    tied = np.round(confidence, 1)
    bins = classification.equal_mass_bins(tied, 10)
    assert all(len(set(bins[tied == value])) == 1 for value in tied)
    order = random.permutation(100)
    assert (classification.equal_mass_bins(tied[order], 10) == bins[order]).all()


def test_plugin_ece_with_one_bin_equals_torchmetrics(random):
    log_probs, labels = calibrated(200, 4, random, 3.0)
    theirs = multiclass_calibration_error(
        torch.tensor(np.exp(log_probs)), torch.tensor(labels), num_classes=4, n_bins=1, norm="l1"
    )
    assert classification.plugin_ece(log_probs, labels, bins=1) == pytest.approx(float(theirs), abs=1e-6)


def test_ece_is_the_mean_product_of_gaps_of_different_rows(random):
    log_probs, labels = calibrated(45, 3, random, 4.0)
    confidence = np.exp(log_probs).max(1)
    gaps, order = confidence - (log_probs.argmax(1) == labels), np.argsort(confidence)
    squared = 0.0
    for part in np.split(order, 5):
        products = [gaps[i] * gaps[j] for i in part for j in part if i != j]
        squared += len(part) / 45 * np.mean(products)
    assert classification.ece(log_probs, labels, bins=5) == pytest.approx(np.sqrt(max(squared, 0.0)))


def test_ece_agrees_with_kumars_formula_where_confidence_is_constant_in_a_bin():
    correct = np.array([1, 1, 0, 1, 1, 0, 1, 0, 1, 1] * 2)
    confidence = np.repeat([0.95, 0.6], 10)
    log_probs = np.log(np.stack([confidence, 1 - confidence], axis=1))
    expected = sum(0.5 * ((c - 0.7) ** 2 - 0.7 * 0.3 / 9) for c in (0.95, 0.6))
    assert classification.ece(log_probs, 1 - correct, bins=2) == pytest.approx(np.sqrt(expected))


def test_debiased_ece_squared_is_unbiased_where_plugin_ece_is_not(random):
    """A calibrated predictor: the mean of ECE^2 (before clipping at 0) is 0 within its standard error."""
    squares, plugins = [], []
    for _ in range(400):
        log_probs, labels = calibrated(200, 2, random)
        error = CalibrationError.of(log_probs[None], labels, 15)
        gaps, bins = error.gaps[0], error.bins[0]
        sums, own, count = (np.bincount(bins, weights=w) for w in (gaps, gaps**2, np.ones_like(gaps)))
        squares.append(float((count / 200 * (sums**2 - own) / (count**2 - count)).sum()))
        plugins.append(float(classification.plugin_ece(log_probs, labels)))
        assert float(classification.ece(log_probs, labels)) == pytest.approx(np.sqrt(max(squares[-1], 0.0)))
    assert abs(np.mean(squares)) < 4 * np.std(squares) / 20
    assert np.mean(plugins) > 0.07


def test_ece_finds_a_known_miscalibration(random):
    confidence = np.full(40_000, 0.9)
    log_probs = np.log(np.stack([confidence, 1 - confidence], axis=1))
    labels = (random.random(40_000) > 0.75).astype(int)
    assert float(classification.ece(log_probs, labels)) == pytest.approx(0.15, abs=0.01)
    assert float(classification.plugin_ece(log_probs, labels)) == pytest.approx(0.15, abs=0.01)


def test_ece_of_one_row_is_zero():
    assert classification.ece(np.log([[0.9, 0.1]]), np.array([1])) == 0.0


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


def test_interval_of_an_ece_covers_the_truth(random):
    """Top choice right with probability 0.8, said to be 0.9 (ECE 0.1), 300 rows."""
    hits, confidence = 0, 0.9 + 1e-4 * np.arange(300) / 300
    log_probs = np.log(np.stack([confidence, 1 - confidence], axis=1))
    for seed in range(200):
        labels = (random.random(300) > 0.8).astype(int)
        interval = bootstrap.bootstrap_interval(CalibrationError.of(log_probs[None], labels, 10), 300, 200, seed)
        hits += interval.low <= 0.1 <= interval.high
    assert hits / 200 >= 0.88


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
