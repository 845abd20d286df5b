"""Calibration errors against independent implementations, and against the truth of predictors that are made up."""

import numpy as np
import pytest
import torch
from helpers.simulated import calibrated, calibrated_in_units
from torchmetrics.functional.classification import multiclass_calibration_error

from pipeline.scores import bootstrap, calibration
from pipeline.scores.bootstrap import percentile_interval
from pipeline.scores.calibration import CalibrationError, PluginCalibrationError, sampling_interval


@pytest.fixture
def random():
    return np.random.default_rng(7)


def test_equal_mass_bins_are_equally_full_and_keep_ties_together(random):
    confidence = random.random(100)
    assert np.bincount(calibration.equal_mass_bins(confidence, 10)).tolist() == [10] * 10
    tied = np.round(confidence, 1)
    bins = calibration.equal_mass_bins(tied, 10)
    assert all(len(set(bins[tied == value])) == 1 for value in tied)
    order = random.permutation(100)
    assert (calibration.equal_mass_bins(tied[order], 10) == bins[order]).all()


@pytest.mark.parametrize("bins", [1, 15])
def test_plugin_ece_equals_torchmetrics(random, bins):
    log_probs, labels = calibrated(200, 4, random, 3.0)
    theirs = multiclass_calibration_error(
        torch.tensor(np.exp(log_probs)), torch.tensor(labels), num_classes=4, n_bins=bins, norm="l1"
    )
    assert calibration.plugin_ece(log_probs, labels, bins) == pytest.approx(float(theirs), abs=1e-6)


def test_ece_is_the_mean_product_of_gaps_of_different_rows(random):
    log_probs, labels = calibrated(45, 3, random, 4.0)
    confidence = np.exp(log_probs).max(1)
    gaps, order = confidence - (log_probs.argmax(1) == labels), np.argsort(confidence)
    squared = 0.0
    for part in np.split(order, 5):
        products = [gaps[i] * gaps[j] for i in part for j in part if i != j]
        squared += len(part) / 45 * np.mean(products)
    assert calibration.ece(log_probs, labels, bins=5) == pytest.approx(np.sqrt(max(squared, 0.0)))


def test_ece_agrees_with_kumars_formula_where_confidence_is_constant_in_a_bin():
    correct = np.array([1, 1, 0, 1, 1, 0, 1, 0, 1, 1] * 2)
    confidence = np.repeat([0.95, 0.6], 10)
    log_probs = np.log(np.stack([confidence, 1 - confidence], axis=1))
    expected = sum(0.5 * ((c - 0.7) ** 2 - 0.7 * 0.3 / 9) for c in (0.95, 0.6))
    assert calibration.ece(log_probs, 1 - correct, bins=2) == pytest.approx(np.sqrt(expected))


def test_debiased_ece_squared_is_unbiased_where_plugin_ece_is_not(random):
    """A calibrated predictor: the mean of ECE^2 (before clipping at 0) is 0 within its standard error."""
    squares, plugins = [], []
    for _ in range(400):
        log_probs, labels = calibrated(200, 2, random)
        error = CalibrationError.of(log_probs[None], labels, 15)
        gaps, bins = error.gaps[0, 0], error.bins[0, 0]
        sums, own, count = (np.bincount(bins, weights=w) for w in (gaps, gaps**2, np.ones_like(gaps)))
        squares.append(float((count / 200 * (sums**2 - own) / (count**2 - count)).sum()))
        plugins.append(float(calibration.plugin_ece(log_probs, labels)))
        assert float(calibration.ece(log_probs, labels)) == pytest.approx(np.sqrt(max(squares[-1], 0.0)))
    assert abs(np.mean(squares)) < 4 * np.std(squares) / 20
    assert np.mean(plugins) > 0.05


def test_ece_finds_a_known_miscalibration(random):
    confidence = np.full(40_000, 0.9)
    log_probs = np.log(np.stack([confidence, 1 - confidence], axis=1))
    labels = (random.random(40_000) > 0.75).astype(int)
    assert float(calibration.ece(log_probs, labels)) == pytest.approx(0.15, abs=0.01)
    assert float(calibration.plugin_ece(log_probs, labels)) == pytest.approx(0.15, abs=0.01)


def test_ece_of_one_row_is_zero():
    assert calibration.ece(np.log([[0.9, 0.1]]), np.array([1])) == 0.0


def test_interval_of_an_ece_covers_the_truth(random):
    """Top choice right with probability 0.8, said to be 0.9 (ECE 0.1), 300 rows."""
    hits, confidence = 0, 0.9 + 1e-4 * np.arange(300) / 300
    log_probs = np.log(np.stack([confidence, 1 - confidence], axis=1))
    for seed in range(200):
        labels = (random.random(300) > 0.8).astype(int)
        interval = bootstrap.bootstrap_interval(CalibrationError.of(log_probs[None], labels, 10), 300, 200, seed)
        hits += interval.low <= 0.1 <= interval.high
    assert hits / 200 >= 0.88


def test_pairs_of_one_unit_do_not_count(random):
    """Against the definition, pair by pair, under weights too."""
    log_probs, labels, units = calibrated_in_units(20, 3, random, 3.0, 0.7)
    error = CalibrationError.of(log_probs[None], labels, 4, units)
    gaps, bins = error.gaps[0, 0], error.bins[0, 0]
    of_unit = random.integers(0, 3, size=20).astype(float)
    for weights in (np.ones(60), of_unit[units]):
        square = 0.0
        for b in range(4):
            inside = np.flatnonzero(bins == b)
            pairs = [(i, j) for i in inside for j in inside if units[i] != units[j]]
            total = sum(weights[i] * weights[j] for i, j in pairs)
            products = sum(weights[i] * weights[j] * gaps[i] * gaps[j] for i, j in pairs)
            square += weights[inside].sum() / weights.sum() * products / total
        assert error.resampled(weights[None])[0] == pytest.approx(np.sqrt(max(square, 0.0)))


def test_classwise_ece_is_the_root_mean_square_over_classes(random):
    log_probs, labels = calibrated(90, 3, random, 3.0)
    squares = []
    for c in range(3):
        said = np.exp(log_probs[:, c])
        bins = calibration.equal_mass_bins(said, 5)
        gaps = said - (labels == c)
        inside = [gaps[bins == b] for b in range(5)]
        squares.append(sum(len(g) / 90 * (g.sum() ** 2 - (g**2).sum()) / (len(g) ** 2 - len(g)) for g in inside))
    found = CalibrationError.classwise(log_probs[None], labels, 5).point()
    assert found == pytest.approx(np.sqrt(np.mean(squares)))


def test_interval_of_the_plugin_ece_is_that_of_its_sampling(random):
    """Of a calibrated predictor: it holds the mean of the estimate, which is far from 0, not 0."""
    values = [calibration.plugin_ece(*calibrated(200, 2, random)) for _ in range(300)]
    hits = 0
    for seed in range(100):
        statistic = PluginCalibrationError.of((drawn := calibrated(200, 2, random))[0][None], drawn[1])
        table = bootstrap.bootstrap([statistic], 200, 200, seed)[:, 0]
        found = sampling_interval(statistic.point(), table)
        hits += found.low <= np.mean(values) <= found.high
    assert np.mean(values) > 0.04 and hits >= 88


@pytest.mark.slow
@pytest.mark.parametrize("overconfidence", [1.0, 2.0])
@pytest.mark.parametrize(("size", "units"), [(1, 400), (4, 100), (10, 100)])
def test_ece_intervals_cover_whatever_the_units(overconfidence, size, units):
    """400 rows or 100 units, whose rows are equal: coverage of at least 0.90, and a mean near the truth."""
    random = np.random.default_rng(11)
    truth = {1.0: 0.0, 2.0: 0.110}[overconfidence]
    hits, points, by_row = 0, [], []
    for seed in range(100):
        log_probs, labels, numbers = calibrated_in_units(units, size, random, overconfidence)
        statistic = CalibrationError.of(log_probs[None], labels, 15, numbers)
        interval = percentile_interval(
            statistic.point(), bootstrap.bootstrap([statistic], len(labels), 200, seed, numbers)[:, 0]
        )
        hits += interval.low <= truth <= interval.high
        points.append(interval.value)
        by_row.append(calibration.ece(log_probs, labels))
    assert hits >= 90
    assert np.mean(points) < truth + 0.06
    if size > 1 and truth == 0.0:
        assert np.mean(by_row) > 0.1, "what pairs of one unit do to a calibrated predictor"


@pytest.mark.slow
def test_differences_of_ece_cover_zero_and_find_what_is_there():
    """Two predictors of the same rows; the second of equal calibration, or twice as sharp."""
    random, covered, found = np.random.default_rng(3), 0, 0
    for seed in range(100):
        logits = random.normal(scale=1.5, size=600)
        labels = (random.random(600) < 1.0 / (1.0 + np.exp(-logits))).astype(int)
        others = logits + 0.05 * random.normal(size=600)
        first, equal, sharp = (
            CalibrationError.of(-np.logaddexp(0.0, np.stack([z, -z], axis=-1))[None], labels, 15)
            for z in (logits, others, 2.0 * logits)
        )
        table = bootstrap.bootstrap([first, equal, sharp], 600, 200, seed)
        same = percentile_interval(equal.point() - first.point(), table[:, 1] - table[:, 0])
        worse = percentile_interval(sharp.point() - first.point(), table[:, 2] - table[:, 0])
        covered += not same.excludes_zero
        found += worse.excludes_zero
    assert covered >= 90 and found >= 70
