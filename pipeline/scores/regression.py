"""Scores of predicted numbers. Pure numpy; intervals come from `pipeline.scores.bootstrap`.

Shapes: values (..., N, 1), other predictors in the leading axes, as log-probabilities are (..., N, C); scores (N,) the
right numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.scores.bootstrap import Floats, Ints

_SMALLEST = 1e-12
"""Mean squared error that counts as none."""


def gaussian_nll(values: Floats, scores: Floats | Ints) -> Floats:
    """Nats per row under a Gaussian around the predicted number, its one variance fitted to these rows: (...).

    The fitted variance is the mean squared error, and the NLL then log(2 pi e MSE) / 2: it orders predictors as the
    mean squared error does.
    """
    error = row_squared_error(values, scores).mean(axis=-1)
    return 0.5 * np.log(2.0 * math.pi * math.e * np.maximum(error, _SMALLEST))


def row_squared_error(values: Floats, scores: Floats | Ints) -> Floats:
    """(value - score)^2: (..., N)."""
    return (values[..., 0].astype(np.float64) - scores) ** 2


@dataclass(frozen=True)
class RootMeanSquare:
    """sqrt(sum_i w_i error_i^2 / sum_i w_i) for squared errors (Q, N): a `bootstrap.Statistic`."""

    squares: Floats

    def point(self) -> float:
        """Mean over predictors."""
        return float(np.sqrt(self.squares.mean(axis=1)).mean())

    def resampled(self, weights: Floats) -> Floats:
        """Resample s scores predictor s mod Q."""
        found = np.empty(len(weights))
        for predictor, squares in enumerate(self.squares):
            own = weights[predictor :: len(self.squares)]
            found[predictor :: len(self.squares)] = np.sqrt(own @ squares / own.sum(axis=1))
        return found


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation of predicted with right numbers, or of their ranks (Spearman): a `bootstrap.Statistic`.

    0 where either is constant. Ranks are taken anew in every resample, ties share the mean of their ranks.
    """

    values: Floats
    """(Q, N)."""
    scores: Floats
    """(N,)."""
    kind: Literal["pearson", "spearman"]

    def point(self) -> float:
        """Mean over predictors."""
        ones = np.ones((1, len(self.scores)))
        return float(np.mean([self._weighted(ones, values) for values in self.values]))

    def resampled(self, weights: Floats) -> Floats:
        """Resample s scores predictor s mod Q."""
        found = np.empty(len(weights))
        for predictor, values in enumerate(self.values):
            own = weights[predictor :: len(self.values)]
            found[predictor :: len(self.values)] = self._weighted(own, values)
        return found

    def _weighted(self, weights: Floats, values: Floats) -> Floats:
        pair: list[Floats] = [values.astype(np.float64)[None], self.scores.astype(np.float64)[None]]
        if self.kind == "spearman":
            pair = [weighted_ranks(numbers[0], weights) for numbers in pair]
        total = weights.sum(axis=1, keepdims=True)
        x, y = (numbers - (weights * numbers).sum(axis=1, keepdims=True) / total for numbers in pair)
        covariance = (weights * x * y).sum(axis=1)
        scale = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
        return np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0.0)


def weighted_ranks(numbers: Floats, weights: Floats) -> Floats:
    """Mid-ranks of (N,) numbers of which number i occurs weights[s, i] times: (S, N)."""
    _, group = np.unique(numbers, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    mass = np.add.reduceat(weights[:, order], starts, axis=1)  # of each distinct number
    return (np.cumsum(mass, axis=1) - (mass - 1.0) / 2.0)[:, group]
