"""Temperature scaling (arXiv 1706.04599): one number, fitted on the calibration split. Pure numpy.

It needs the whole distribution over the choices; predictions of which only the reference answer's token
probabilities are kept (completion data) cannot be scaled.
"""

from __future__ import annotations

import numpy as np

from pipeline.scores.bootstrap import Floats, Ints

MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0
"""Bounds of a fit. Where all rows are right, or worse than chance, the best temperature would be 0 or infinite."""

_HALVINGS = 50


def fit_temperature(log_probs: Floats, labels: Ints) -> float:
    """The T in [0.05, 20] that minimises the NLL of softmax(log_probs / T), for log_probs (N, C).

    A predictor without any preference (all choices equal in every row) has no best T and gets 1.

    Raises:
        ValueError: no rows, or a label whose choice has probability 0 (no T can mend that).
    """
    return float(fit_temperatures(log_probs[None], labels)[0])


def fit_temperatures(log_probs: Floats, labels: Ints) -> Floats:
    """`fit_temperature` of each of Q predictors at once: (Q, N, C) -> (Q,).

    The NLL is convex in b = 1/T, with the slope mean_i (E_b[l_i] - l_i,label); its root is found by halving
    the interval of log b.
    """
    logs = log_probs.astype(np.float64)
    right = logs[:, np.arange(len(labels)), labels]  # (Q, N)
    if right.size == 0 or not np.isfinite(right).all():
        raise ValueError("temperature: needs at least one row, and every label's choice with a probability above 0")
    low = np.full(len(logs), np.log(1.0 / MAX_TEMPERATURE))
    high = np.full(len(logs), np.log(1.0 / MIN_TEMPERATURE))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        rising = _slope(logs, right, np.exp(middle)) > 0.0
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    flat = np.array([_has_no_preference(one) for one in logs])
    return np.where(flat, 1.0, np.exp(-(low + high) / 2.0))


def apply_temperature(log_probs: Floats, temperature: float | Floats) -> Floats:
    """Normalised log-probabilities of softmax(log_probs / T), the order of the choices kept.

    Args:
        log_probs: (..., N, C).
        temperature: T, or one per predictor with the shape of the leading axes (...).
    """
    scaled = log_probs.astype(np.float64) / np.asarray(temperature, dtype=np.float64)[..., None, None]
    return scaled - np.logaddexp.reduce(scaled, axis=-1, keepdims=True)


def at_bound(temperature: float) -> bool:
    """Whether a fit ended at its lower or upper bound, up to the search's precision."""
    return temperature <= MIN_TEMPERATURE * 1.001 or temperature >= MAX_TEMPERATURE / 1.001


def _slope(logs: Floats, right: Floats, inverse: Floats) -> Floats:
    """d NLL / d b at b = inverse (Q,): (Q,)."""
    probabilities = np.exp(apply_temperature(logs, 1.0 / inverse))
    expected = (probabilities * np.where(np.isfinite(logs), logs, 0.0)).sum(axis=-1)
    return (expected - right).mean(axis=-1)


def _has_no_preference(logs: Floats) -> bool:
    finite = np.where(np.isfinite(logs), logs, logs.max(axis=-1, keepdims=True))
    return bool((np.ptp(finite, axis=-1) == 0.0).all())
