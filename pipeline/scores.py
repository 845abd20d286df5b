"""Scores of predictions, and bootstrap intervals around them. Pure numpy.

Shapes: log_probs (..., N, C), natural logarithms normalised over the C choices, -inf for a choice that
a row does not have; labels (N,), indices of the right choices. Leading axes are other predictors and
are kept. NLL is in nats; a Brier score is the sum over classes, in [0, 2].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

LEVEL = 0.95
_CHUNK_NUMBERS = 4_000_000
"""Bootstrap weights held in memory at once."""


def row_correct(log_probs: Floats, labels: Ints) -> Floats:
    """1 where the most probable choice is the label (the first of equals), else 0: (..., N)."""
    return (log_probs.argmax(axis=-1) == labels).astype(np.float64)


def row_nll(log_probs: Floats, labels: Ints) -> Floats:
    """-log p(label) in nats: (..., N)."""
    return -log_probs[..., np.arange(len(labels)), labels].astype(np.float64)


def row_brier(log_probs: Floats, labels: Ints) -> Floats:
    """sum_c (p_c - [c = label])^2 = sum_c p_c^2 - 2 p_label + 1, the multi-class form in [0, 2]: (..., N)."""
    probabilities = np.exp(log_probs.astype(np.float64))
    return (probabilities**2).sum(axis=-1) - 2.0 * np.exp(-row_nll(log_probs, labels)) + 1.0


ROW_SCORES: dict[str, Callable[[Floats, Ints], Floats]] = {
    "accuracy": row_correct,
    "nll": row_nll,
    "brier": row_brier,
}
"""The scores that are means of one value per row."""


def accuracy(log_probs: Floats, labels: Ints) -> Floats:
    """Share of rows whose most probable choice is the label: (...)."""
    return row_correct(log_probs, labels).mean(axis=-1)


def nll(log_probs: Floats, labels: Ints) -> Floats:
    """Mean negative log-likelihood in nats per row: (...)."""
    return row_nll(log_probs, labels).mean(axis=-1)


def brier(log_probs: Floats, labels: Ints) -> Floats:
    """Mean Brier score, summed over classes: (...)."""
    return row_brier(log_probs, labels).mean(axis=-1)


def perplexity(token_log_probs: Floats) -> Floats:
    """exp of the mean NLL in nats per token: (..., tokens) -> (...)."""
    return np.exp(-token_log_probs.astype(np.float64).mean(axis=-1))


def ece(log_probs: Floats, labels: Ints, bins: int = 15) -> Floats:
    """Expected calibration error of the top choice: root mean square over equal-mass bins, debiased: (...).

    With the gap g = confidence - correct, ECE^2 = sum_b (n_b / N) U_b, where U_b is the mean of g_i g_j over
    pairs of *different* rows of bin b: unbiased for (E[g | b])^2, where the square of the mean gap is not, and
    finds miscalibration in a perfectly calibrated predictor. This is the debiasing of Kumar et al. 2019
    (arXiv 1909.10155, section 5) written for gaps, as in T-Cal (arXiv 2203.01850, section 4.1). A negative
    ECE^2 (chance) is reported as 0. Bins: see `equal_mass_bins`; a bin with one row adds nothing.
    """
    return _over_predictors(log_probs, lambda one: CalibrationError.of(one[None], labels, bins).point())


def plugin_ece(log_probs: Floats, labels: Ints, bins: int = 15) -> Floats:
    """The usual L1 ECE, sum_b (n_b / N) |mean gap|, over equal-mass bins: (...). Biased upwards; for comparison."""
    return _over_predictors(log_probs, lambda one: reliability(one, labels, bins).plugin_ece())


@dataclass(frozen=True)
class Reliability:
    """Points of a reliability diagram: per non-empty bin the mean confidence, the accuracy and the rows."""

    confidence: Floats
    accuracy: Floats
    rows: Ints

    def plugin_ece(self) -> float:
        """Mean over rows of the absolute gap of the row's bin."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.rows))


def reliability(log_probs: Floats, labels: Ints, bins: int = 15) -> Reliability:
    """Mean confidence and accuracy in equal-mass bins of confidence, of one predictor (N, C)."""
    confidence = np.exp(log_probs.max(axis=-1).astype(np.float64))
    bin_of_row = equal_mass_bins(confidence, bins)
    rows = np.bincount(bin_of_row)
    used = rows > 0
    totals = [np.bincount(bin_of_row, weights=v)[used] for v in (confidence, row_correct(log_probs, labels))]
    return Reliability(totals[0] / rows[used], totals[1] / rows[used], rows[used])


def equal_mass_bins(confidence: Floats, bins: int) -> Ints:
    """Bin of each row, equally full up to rounding; ties share a bin: (N,)."""
    count = bin_count(len(confidence), bins)
    starts = [len(confidence) * k // count for k in range(1, count)]
    return np.searchsorted(np.unique(np.sort(confidence)[starts]), confidence, side="right")


def bin_count(rows: int, bins: int) -> int:
    """Bins in use: at most one for every two rows."""
    return max(1, min(bins, rows // 2))


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
class CalibrationError:
    """The debiased ECE of `ece`, for gaps and bins (Q, N).

    Under weights a pair of the *same* row is still left out however often the row was drawn: a plain
    resample would count it as a pair of two rows and be biased upwards. Bins stay those of the full sample.
    """

    gaps: Floats
    bins: Ints

    @classmethod
    def of(cls, log_probs: Floats, labels: Ints, bins: int) -> CalibrationError:
        """From log_probs (Q, N, C)."""
        confidence = np.exp(log_probs.max(axis=-1).astype(np.float64))
        gaps = confidence - row_correct(log_probs, labels)
        return cls(gaps, np.stack([equal_mass_bins(c, bins) for c in confidence]))

    def point(self) -> float:
        """Mean over predictors."""
        ones = np.ones((1, self.gaps.shape[1]))
        return float(np.mean([self._weighted(ones, *one) for one in zip(self.gaps, self.bins, strict=True)]))

    def resampled(self, weights: Floats) -> Floats:
        """Resample s scores predictor s mod Q."""
        scores = np.empty(len(weights))
        for predictor, one in enumerate(zip(self.gaps, self.bins, strict=True)):
            scores[predictor :: len(self.gaps)] = self._weighted(weights[predictor :: len(self.gaps)], *one)
        return scores

    @staticmethod
    def _weighted(weights: Floats, gaps: Floats, bin_of_row: Ints) -> Floats:
        inside = (bin_of_row[:, None] == np.arange(bin_of_row.max() + 1)).astype(np.float64)  # (N, bins)
        mass, squares = weights @ inside, weights**2
        pairs = mass**2 - squares @ inside  # weight of the pairs of different rows
        products = (weights @ (gaps[:, None] * inside)) ** 2 - squares @ (gaps[:, None] ** 2 * inside)
        unbiased = np.divide(products, pairs, out=np.zeros_like(products), where=pairs > 0.5)
        return np.sqrt(np.maximum((mass * unbiased).sum(axis=1) / mass.sum(axis=1), 0.0))


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
    chunks = _weights(rows if units is None else int(units.max()) + 1, samples, seed)
    return np.concatenate([
        np.stack([one.resampled(w if units is None else w[:, units]) for one in statistics], axis=1) for w in chunks
    ])


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


def _weights(units: int, samples: int, seed: int) -> Iterator[Floats]:
    """How often each unit was drawn, (S, units), in chunks that fit memory."""
    random = np.random.default_rng(seed)
    step = max(64, _CHUNK_NUMBERS // units)
    for start in range(0, samples, step):
        count = min(step, samples - start)
        drawn = random.integers(units, size=(count, units)) + units * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units).astype(np.float64)


def _over_predictors(log_probs: Floats, score: Callable[[Floats], float]) -> Floats:
    """`score` of every (N, C) in (..., N, C): (...)."""
    flat = log_probs.reshape(-1, *log_probs.shape[-2:])
    return np.array([score(one) for one in flat]).reshape(log_probs.shape[:-2])
