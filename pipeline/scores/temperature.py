"""Temperature scaling (arXiv 1706.04599), shrunk towards 1: one number, fitted on the calibration split.

It acts on log-probabilities normalised over a row's choices, and needs all of them: predictions of which only the
reference answer's token probabilities are kept (completion data) cannot be scaled.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.scores.bootstrap import Floats, Ints

PRIOR_SD = 0.35
"""Standard deviation of the prior of log T, a normal one around 0: before the rows speak, T is in [1/2, 2] with 95 %.

Rows that are nearly all right have their best likelihood at T -> 0 and say next to nothing about T: 200 calibrated
predictions at 98.9 % accuracy raise the test NLL by .03 in the mean without the prior, by less than .001 with it."""
MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0
"""Bounds of a fit; with the prior only a predictor that is wrong by far in many rows gets there."""

_HALVINGS = 32
_NORMAL_95 = 1.96


def fit_temperature(log_probs: Floats, labels: Ints, units: Ints | None = None) -> float:
    """The T in [0.05, 20] that minimises sum_i nll_i(T) + (log T)² / (2 · 0.35²), in nats, for log_probs (N, C).

    nll_i is that of softmax(log_probs_i / T): the mode of the posterior under the prior of `PRIOR_SD`. With units
    (N,) the sum is divided by the rows' `design_effect`: copies do not outweigh the prior by their number.

    Raises:
        ValueError: no rows, or a label whose choice has probability 0 (no T can mend that).
    """
    return float(fit_temperatures(log_probs[None], labels, units=units)[0])


def fit_temperatures(
    log_probs: Floats, labels: Ints, weights: Floats | None = None, units: Ints | None = None
) -> Floats:
    """`fit_temperature` of each of Q predictors at once: (Q, N, C) -> (Q,).

    Args:
        weights: (Q, N) how often each row counts; None: once.
    """
    found = _modes(log_probs, labels, weights)
    if units is None:
        return found
    effects = [design_effect(one, labels, value, units) for one, value in zip(log_probs, found.tolist(), strict=True)]
    counts = np.ones(log_probs.shape[:2]) if weights is None else weights
    return _modes(log_probs, labels, counts / np.array(effects)[:, None])


def _modes(log_probs: Floats, labels: Ints, weights: Floats | None) -> Floats:
    """The slope over b = 1/T is sum_i w_i (E_b[l_i] - l_i,label), that over log b has the prior's beside it; its root
    is found by halving the interval of log b."""
    logs = log_probs.astype(np.float64)
    right = logs[:, np.arange(len(labels)), labels]  # (Q, N)
    if right.size == 0 or not np.isfinite(right).all():
        raise ValueError("temperature: needs at least one row, and every label's choice with a probability above 0")
    counts = np.ones_like(right) if weights is None else weights
    best = logs.max(axis=-1)  # sums over the first axis are several times faster than over a short last one
    relative, right = np.ascontiguousarray(np.moveaxis(logs - best[..., None], -1, 0)), right - best
    finite = np.where(np.isfinite(relative), relative, 0.0)
    low = np.full(len(logs), np.log(1.0 / MAX_TEMPERATURE))
    high = np.full(len(logs), np.log(1.0 / MIN_TEMPERATURE))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        likelihoods = np.exp(relative * np.exp(middle)[:, None])
        expected = (likelihoods * finite).sum(axis=0) / likelihoods.sum(axis=0)
        slope = (counts * (expected - right)).sum(axis=-1) * np.exp(middle) + middle / PRIOR_SD**2
        low, high = np.where(slope > 0.0, low, middle), np.where(slope > 0.0, middle, high)
    return np.exp(-(low + high) / 2.0)


def apply_temperature(log_probs: Floats, temperature: float | Floats) -> Floats:
    """Normalised log-probabilities of softmax(log_probs / T), the order of the choices kept.

    Args:
        log_probs: (..., N, C).
        temperature: T, or one per predictor with the shape of the leading axes (...).
    """
    scaled = log_probs.astype(np.float64) / np.asarray(temperature, dtype=np.float64)[..., None, None]
    return scaled - np.logaddexp.reduce(scaled, axis=-1, keepdims=True)


def information(log_probs: Floats, labels: Ints, temperature: float, units: Ints | None = None) -> float:
    """What rows (N, C) say about log T at T: the Fisher information sum_i Var(l_i) / T², l_i under softmax(l_i / T),
    over the `design_effect` where rows share units (N,).

    The standard deviation of log T given the rows is 1 / sqrt(information + 1 / PRIOR_SD²).
    """
    probabilities = np.exp(apply_temperature(log_probs, temperature))
    finite = np.where(np.isfinite(log_probs), log_probs.astype(np.float64), 0.0)
    mean = (probabilities * finite).sum(axis=-1, keepdims=True)
    fisher = float((probabilities * (finite - mean) ** 2).sum()) / temperature**2
    return fisher if units is None else fisher / design_effect(log_probs, labels, temperature, units)


def design_effect(log_probs: Floats, labels: Ints, temperature: float, units: Ints) -> float:
    """How many rows say as much about T as one would, if rows of a unit had nothing in common; at least 1.

    U / (U - 1) · sum_u (sum_{i in u} s_i)² / sum_i s_i² for U units, s_i = E[l_i] - l_i,label the score of a row: the
    number of rows where those of a unit are copies. Infinite for a single unit, which says nothing about others.
    """
    _, numbers = np.unique(units, return_inverse=True)
    count = int(numbers.max()) + 1
    if count == 1:
        return math.inf
    finite = np.where(np.isfinite(log_probs), log_probs.astype(np.float64), 0.0)
    expected = (np.exp(apply_temperature(log_probs, temperature)) * finite).sum(axis=-1)
    scores = expected - finite[np.arange(len(labels)), labels]
    if not scores.any():
        return 1.0
    by_unit = np.bincount(numbers, weights=scores)
    return max(1.0, float((by_unit**2).sum() / (scores**2).sum()) * count / (count - 1))


def is_carried(log_probs: Floats, labels: Ints, temperature: float, units: Ints | None = None) -> bool:
    """Whether the rows say more about the temperature than the prior does; else it is more shrinkage than fit."""
    return information(log_probs, labels, temperature, units) > 1.0 / PRIOR_SD**2


def at_bound(temperature: float) -> bool:
    """Whether a fit ended at its lower or upper bound, up to the search's precision."""
    return temperature <= MIN_TEMPERATURE * 1.001 or temperature >= MAX_TEMPERATURE / 1.001


def posterior_interval(
    log_probs: Floats, labels: Ints, temperature: float, units: Ints | None = None
) -> tuple[float, float]:
    """Ends of 95 % of the posterior of T, taken as normal in log T."""
    known = information(log_probs, labels, temperature, units) + 1.0 / PRIOR_SD**2
    factor = math.exp(_NORMAL_95 / math.sqrt(known))
    return temperature / factor, temperature * factor
