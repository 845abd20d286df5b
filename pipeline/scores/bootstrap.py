"""Statistics of rows, and bootstrap intervals around them and their paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

LEVEL = 0.95
_CHUNK_NUMBERS = 4_000_000
"""Bootstrap weights held in memory at once."""


class Statistic(Protocol):
    """A score of N rows that can be taken under row weights.

    A statistic may stand for Q interchangeable predictors (ensembles of the same size with other mask draws).
    Its point is the mean over them; each resample scores *one* of them, so that an interval holds the variance
    over rows and over draws: where the score of one random draw on other rows would lie.
    """

    def point(self) -> float:
        """The score on the rows as they are."""

    def resampled(self, weights: Floats) -> Floats:
        """Scores under weights (S, N), how often each row was drawn: (S,)."""


@dataclass(frozen=True)
class Refitted:
    """A statistic of predictors that were fitted on other rows (a temperature), which its resamples draw anew."""

    fitted: Statistic
    """Of the predictors as they are."""
    refitted: Statistic
    """Of R predictors, each fitted on one resample of those other rows: resample s scores number s mod R."""

    def point(self) -> float:
        """That of the predictors as they are."""
        return self.fitted.point()

    def resampled(self, weights: Floats) -> Floats:
        """Over both kinds of rows."""
        return self.refitted.resampled(weights)


@dataclass(frozen=True)
class Negative:
    """A score of which more is better, as a loss."""

    score: Statistic

    def point(self) -> float:
        """Less is better."""
        return -self.score.point()

    def resampled(self, weights: Floats) -> Floats:
        """Less is better."""
        return -self.score.resampled(weights)


@dataclass(frozen=True)
class RowMean:
    """sum_i w_i value_i / sum_i w_i size_i, for values (Q, N) and sizes (N,) (1, or the tokens of a row)."""

    values: Floats
    sizes: Floats | None = None

    def point(self) -> float:
        """Mean over rows and predictors."""
        total = self.values.shape[1] if self.sizes is None else self.sizes.sum()
        return float(self.values.mean(axis=0).sum() / total)

    def resampled(self, weights: Floats) -> Floats:
        """Resample s scores predictor s mod Q."""
        total = weights.sum(axis=1) if self.sizes is None else weights @ self.sizes
        sums = np.empty(len(weights))
        for predictor, values in enumerate(self.values):
            sums[predictor :: len(self.values)] = weights[predictor :: len(self.values)] @ values
        return sums / total


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Both ends on one side of 0."""
        return self.low > 0.0 or self.high < 0.0


def bootstrap(
    statistics: Sequence[Statistic], rows: int, samples: int = 2000, seed: int = 0, units: Ints | None = None
) -> Floats:
    """Every statistic on the same resamples of rows, so that their differences are paired: (samples, statistics).

    Args:
        rows: N.
        units: (N,) index from 0 of the independent unit (document) each row belongs to; whole units are drawn.
            None: every row is a unit.
    """
    return np.concatenate([
        np.stack([one.resampled(w) for one in statistics], axis=1) for w in row_weights(rows, samples, seed, units)
    ])


def unit_count(rows: int, units: Ints | None) -> int:
    """Independent units among N rows."""
    return rows if units is None else int(units.max()) + 1


def percentile_interval(value: float, resamples: Floats) -> Interval:
    """The central 95 % of resamples (S,)."""
    low, high = np.quantile(resamples, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return Interval(float(value), float(low), float(high))


def bootstrap_interval(
    statistic: Statistic, rows: int, samples: int = 2000, seed: int = 0, units: Ints | None = None
) -> Interval:
    """Percentile interval of one statistic over N rows (or units)."""
    return percentile_interval(statistic.point(), bootstrap([statistic], rows, samples, seed, units)[:, 0])


def paired_difference_interval(
    first: Statistic, second: Statistic, rows: int, samples: int = 2000, seed: int = 0, units: Ints | None = None
) -> Interval:
    """Percentile interval of first - second, both on the same resampled rows (or units)."""
    pair = bootstrap([first, second], rows, samples, seed, units)
    return percentile_interval(first.point() - second.point(), pair[:, 0] - pair[:, 1])


def row_weights(rows: int, samples: int, seed: int, units: Ints | None = None) -> Iterator[Floats]:
    """How often each row was drawn (with all of its unit), (S, N), in chunks that fit memory."""
    random, count = np.random.default_rng(seed), unit_count(rows, units)
    step = max(64, _CHUNK_NUMBERS // rows)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        drawn = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        yield weights if units is None else weights[:, units]
