"""Temperature scaling against a general optimizer and a known truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from pipeline.scores.temperature import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply_temperature,
    at_bound,
    fit_temperature,
    fit_temperatures,
)


def draw(rows, choices, temperature, seed=0):
    """Predictions softmax(z) of labels that follow softmax(z / temperature)."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=2.0, size=(rows, choices))
    truth = np.exp(log_softmax(logits / temperature, axis=1))
    labels = (truth.cumsum(axis=1) < random.random(rows)[:, None]).sum(axis=1).clip(max=choices - 1)
    return log_softmax(logits, axis=1), labels


def loss(temperature, log_probs, labels):
    return -log_softmax(log_probs / temperature, axis=1)[np.arange(len(labels)), labels].mean()


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


def test_rows_that_are_all_right_or_all_wrong_stop_at_the_bounds():
    log_probs, _ = draw(50, 2, 1.0)
    right = log_probs.argmax(axis=1)
    assert fit_temperature(log_probs, right) == pytest.approx(MIN_TEMPERATURE)
    assert fit_temperature(log_probs, 1 - right) == pytest.approx(MAX_TEMPERATURE)
    assert at_bound(fit_temperature(log_probs, right)) and at_bound(fit_temperature(log_probs, 1 - right))
    assert not at_bound(1.0)


def test_labels_of_one_class_are_no_special_case():
    log_probs, _ = draw(500, 2, 1.0)
    assert MIN_TEMPERATURE <= fit_temperature(log_probs, np.zeros(500, dtype=int)) <= MAX_TEMPERATURE


def test_no_preference_has_temperature_one():
    assert fit_temperature(np.log(np.full((4, 2), 0.5)), np.array([0, 1, 1, 1])) == 1.0


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
