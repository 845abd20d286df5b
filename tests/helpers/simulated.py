"""Predictors whose calibration is known, and labels drawn to fit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, ndtr

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


def calibrated(
    rows: int, choices: int, random: np.random.Generator, overconfidence: float = 1.0, scale: float = 1.5
) -> tuple[Floats, Ints]:
    """Labels drawn from softmax(z); predictions softmax(overconfidence z): (log_probs, labels)."""
    logits = random.normal(scale=scale, size=(rows, choices))
    truth = np.exp(log_softmax(logits, axis=1))
    labels = (truth.cumsum(axis=1) < random.random(rows)[:, None]).sum(axis=1).clip(max=choices - 1)
    return log_softmax(overconfidence * logits, axis=1), labels


def calibrated_in_units(
    units: int, size: int, random: np.random.Generator, overconfidence: float = 1.0, correlation: float = 1.0
) -> tuple[Floats, Ints, Ints]:
    """Two choices; rows of a unit share logits and luck as far as `correlation` says: (log_probs, labels, units)."""
    def shared() -> Floats:
        own = np.sqrt(1.0 - correlation) * random.normal(size=(units, size))
        return np.sqrt(correlation) * random.normal(size=(units, 1)) + own

    logits, luck = 1.5 * shared(), shared()
    labels = (ndtr(luck) < 1.0 / (1.0 + np.exp(-logits))).astype(int)
    sharp = overconfidence * np.stack([-logits, logits], axis=-1) / 2.0
    return log_softmax(sharp, axis=-1).reshape(-1, 2), labels.ravel(), np.repeat(np.arange(units), size)
