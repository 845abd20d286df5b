"""Temperature scaling against a general optimizer and a known truth."""

import numpy as np
import pytest
from helpers.simulated import calibrated, calibrated_in_units
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from pipeline.scores.classification import nll
from pipeline.scores.temperature import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply_temperature,
    at_bound,
    fit_temperature,
    fit_temperatures,
    information,
    is_carried,
    posterior_interval,
)


def draw(rows, choices, temperature, seed=0):
    """Predictions softmax(z) of labels that follow softmax(z / temperature)."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=2.0, size=(rows, choices))
    truth = np.exp(log_softmax(logits / temperature, axis=1))
    labels = (truth.cumsum(axis=1) < random.random(rows)[:, None]).sum(axis=1).clip(max=choices - 1)
    return log_softmax(logits, axis=1), labels


def loss(temperature, log_probs, labels):
    """NLL, and the prior of log T over the rows."""
    nll = -log_softmax(log_probs / temperature, axis=1)[np.arange(len(labels)), labels]
    return nll.sum() + np.log(temperature) ** 2 / (2.0 * 0.35**2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_recovers_the_temperature_behind_the_labels(temperature):
    log_probs, labels = draw(20_000, 3, temperature)
    assert fit_temperature(log_probs, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_minimum_that_scipy_finds(seed):
    log_probs, labels = draw(60, 4, 2.0, seed)
    best = minimize_scalar(loss, bounds=(0.05, 20.0), args=(log_probs, labels), method="bounded",
                           options={"xatol": 1e-9})
    assert fit_temperature(log_probs, labels) == pytest.approx(best.x, rel=1e-4)


def test_many_predictors_at_once_equal_one_by_one():
    pairs = [draw(80, 3, 1.0, seed) for seed in range(4)]
    labels = pairs[0][1]
    together = fit_temperatures(np.stack([p for p, _ in pairs]), labels)
    assert together == pytest.approx([fit_temperature(p, labels) for p, _ in pairs])


def test_missing_choices_do_not_count():
    log_probs, labels = draw(100, 3, 2.0)
    padded = np.concatenate([log_probs, np.full((100, 1), -np.inf)], axis=1)
    fitted = fit_temperature(padded, labels)
    assert fitted == pytest.approx(fit_temperature(log_probs, labels))
    scaled = apply_temperature(padded, fitted)
    assert np.isneginf(scaled[:, 3]).all() and scaled[:, :3] == pytest.approx(apply_temperature(log_probs, fitted))


def test_rows_that_are_all_right_no_longer_lead_to_the_bound():
    log_probs, _ = draw(50, 2, 1.0)
    right = log_probs.argmax(axis=1)
    found = fit_temperature(log_probs, right)
    assert 0.25 < found < 1.0 and not at_bound(found) and not at_bound(1.0)
    assert at_bound(fit_temperature(20.0 * log_probs, 1 - right)), "far too sure, and always wrong"


def test_weights_are_copies_of_rows():
    log_probs, labels = draw(40, 3, 2.0)
    counts = np.random.default_rng(0).integers(0, 4, size=40)
    copied = fit_temperature(np.repeat(log_probs, counts, axis=0), np.repeat(labels, counts))
    assert fit_temperatures(log_probs[None], labels, counts[None].astype(float))[0] == pytest.approx(copied)


def test_the_interval_is_that_of_the_posterior_on_a_grid():
    log_probs, labels = draw(300, 3, 1.5)
    found = fit_temperature(log_probs, labels)
    grid = np.linspace(np.log(0.5), np.log(5.0), 2001)
    density = np.exp(-np.array([loss(np.exp(x), log_probs, labels) for x in grid]) + loss(found, log_probs, labels))
    mass = density.cumsum() / density.sum()
    low, high = (float(np.exp(grid[np.searchsorted(mass, share)])) for share in (0.025, 0.975))
    assert posterior_interval(log_probs, labels, found) == pytest.approx((low, high), rel=0.03)


def test_rows_carry_a_temperature_where_they_outweigh_the_prior():
    log_probs, labels = draw(400, 2, 1.5)
    assert is_carried(log_probs, labels, fit_temperature(log_probs, labels))
    sure = log_softmax(np.stack([np.full(200, 9.0), np.zeros(200)], axis=1), axis=1)
    right = np.zeros(200, dtype=int)
    assert not is_carried(sure, right, fit_temperature(sure, right))


def test_copies_of_a_row_in_one_unit_say_no_more_than_the_row():
    log_probs, labels = draw(400, 3, 1.5)
    alone = information(log_probs, labels, 1.4)
    copied = np.repeat(log_probs, 4, axis=0), np.repeat(labels, 4)
    assert information(*copied, 1.4) == pytest.approx(4.0 * alone)
    assert information(*copied, 1.4, np.repeat(np.arange(400), 4)) == pytest.approx(alone, rel=0.01)
    assert information(*copied, 1.4, np.zeros(1600, dtype=int)) == 0.0, "one document says nothing about others"
    for rows in (log_probs, log_probs[:50]):
        alone = fit_temperature(rows, labels[: len(rows)])
        units = np.repeat(np.arange(len(rows)), 4)
        copied = np.repeat(rows, 4, axis=0), np.repeat(labels[: len(rows)], 4)
        assert fit_temperature(*copied, units) == pytest.approx(alone, rel=0.02)
        assert fit_temperature(*copied, 0 * units) == pytest.approx(1.0)
    strangers = draw(1600, 3, 1.5, seed=1)
    said = information(*strangers, 1.4, np.repeat(np.arange(400), 4))
    assert 0.8 * information(*strangers, 1.4) < said <= information(*strangers, 1.4)


@pytest.mark.slow
@pytest.mark.parametrize("units", [50, 300])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_the_interval_holds_its_level_for_rows_in_units_of_four(units, correlation):
    """Temperatures drawn from the prior, of which the interval holds 95 %; of copies counted as rows, 70 %."""
    random = np.random.default_rng(11)
    held = []
    for truth in np.exp(0.35 * random.normal(size=1000)):
        log_probs, labels, numbers = calibrated_in_units(units, 4, random, truth, correlation)
        found = fit_temperature(log_probs, labels, numbers)
        low, high = posterior_interval(log_probs, labels, found, numbers)
        held.append(low <= truth <= high)
    assert 0.92 <= np.mean(held) <= 0.98


def nearly_right(rows, accuracy, sharpness, random, choices=2):
    """Predictions of a given accuracy; with sharpness 1 they are calibrated."""
    scale = {0.989: 41.0, 0.966: 13.0, 0.85: 2.15}[accuracy]
    return calibrated(rows, choices, random, sharpness, scale)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "accuracy"), [(200, 0.989), (50, 0.966), (200, 0.85), (50, 0.85)])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_a_temperature_is_never_worse_than_none(rows, accuracy, sharpness):
    """Mean test NLL over 300 fits, less that at T = 1: at most 0.005 nats, and a gain where there is one to be had."""
    random = np.random.default_rng(5)
    test, labels = nearly_right(4000, accuracy, sharpness, random)
    assert np.mean(test.argmax(axis=1) == labels) == pytest.approx(accuracy, abs=0.02)
    gains = []
    for _ in range(300):
        fitted = fit_temperature(*nearly_right(rows, accuracy, sharpness, random))
        gains.append(nll(apply_temperature(test, fitted), labels) - nll(test, labels))
    assert np.mean(gains) < 0.005
    if sharpness != 1.0:
        assert np.mean(gains) < 0.0


@pytest.mark.slow
@pytest.mark.parametrize("units", [13, 50])
def test_copies_of_calibration_rows_are_no_reason_to_be_worse_than_none(units):
    """Four copies of every row, of a calibrated predictor: counted as rows, .016 and .009 nats are lost."""
    random = np.random.default_rng(5)
    test, labels = nearly_right(4000, 0.85, 1.0, random)
    losses = []
    for _ in range(150):
        log_probs, right = (np.repeat(part, 4, axis=0) for part in nearly_right(units, 0.85, 1.0, random))
        fitted = fit_temperature(log_probs, right, np.repeat(np.arange(units), 4))
        losses.append(nll(apply_temperature(test, fitted), labels) - nll(test, labels))
    assert np.mean(losses) < 0.005


@pytest.mark.slow
def test_with_many_rows_nothing_of_the_gain_is_lost():
    random = np.random.default_rng(6)
    test, labels = calibrated(4000, 2, random, 2.0)
    fitted = fit_temperature(*calibrated(2000, 2, random, 2.0))
    free = minimize_scalar(lambda t: nll(apply_temperature(test, t), labels), bounds=(0.5, 5.0), method="bounded").fun
    assert nll(apply_temperature(test, fitted), labels) - free < 0.001 < nll(test, labels) - free


def test_labels_of_one_class_are_no_special_case():
    log_probs, _ = draw(500, 2, 1.0)
    assert MIN_TEMPERATURE <= fit_temperature(log_probs, np.zeros(500, dtype=int)) <= MAX_TEMPERATURE


def test_no_preference_has_temperature_one():
    assert fit_temperature(np.log(np.full((4, 2), 0.5)), np.array([0, 1, 1, 1])) == pytest.approx(1.0)


def test_impossible_labels_and_no_rows_are_refused():
    with pytest.raises(ValueError, match="probability above 0"):
        fit_temperature(np.array([[0.0, -np.inf]]), np.array([1]))
    with pytest.raises(ValueError, match="at least one row"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0, dtype=int))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.floats(MIN_TEMPERATURE, MAX_TEMPERATURE))
def test_scaling_keeps_the_argmax_and_normalises(seed, temperature):
    log_probs, _ = draw(20, 5, 1.0, seed)
    scaled = apply_temperature(log_probs, temperature)
    assert (scaled.argmax(axis=1) == log_probs.argmax(axis=1)).all()
    assert scaled == pytest.approx(log_softmax(log_probs / temperature, axis=1), abs=1e-9)
