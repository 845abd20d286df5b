"""Calibration errors of predicted choices, and the points of a reliability diagram. Shapes as in `classification`.

A gap is what is said less what is so: confidence - correct for the top choice, p_c - [c = label] for class c. Two
estimates, each under its own name: the debiased one, 0 in the mean for a calibrated predictor, and the plug-in one
that the literature prints, which is above 0 for every predictor and the more so the fewer rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.scores.bootstrap import Floats, Interval, Ints, percentile_interval
from pipeline.scores.classification import row_correct

PLUGIN_BINS = 15
"""Bins of the plug-in ECEs, as in arXiv 1706.04599."""


@dataclass(frozen=True)
class CalibrationError:
    """The debiased ECE, root mean square over equal-mass bins: a `bootstrap.Statistic`.

    ECE² = mean over K groups of sum_b (n_b / N) U_b, where U_b is the mean of g_i g_j over pairs of rows of bin b that
    belong to *different units*: unbiased for (E[g | b])², where the square of the mean gap is not and finds
    miscalibration in a perfectly calibrated predictor. This is the debiasing of Kumar et al. 2019 (arXiv 1909.10155,
    section 5) written for gaps, as in T-Cal (arXiv 2203.01850, section 4.1), with pairs within a question or document
    left out as pairs within a row are there. A negative ECE² (chance) is reported as 0. K is 1 for the top choice; C
    for the classwise error (arXiv 1910.12656, there an L1 plug-in estimate), in which a choice that a row lacks
    has a gap of 0.

    Under weights a pair within a unit is still left out however often the unit was drawn: a plain resample would
    count it as a pair of two and be biased upwards. Bins stay those of the full sample.
    """

    gaps: Floats
    """(Q, K, N)."""
    bins: Ints
    """(Q, K, N)."""
    units: Ints
    """(N,) number of each row's unit, from 0."""

    @classmethod
    def of(cls, log_probs: Floats, labels: Ints, bins: int, units: Ints | None = None) -> CalibrationError:
        """Of the top choice, from log_probs (Q, N, C) and units (N,) (None: a row each)."""
        confidence = np.exp(log_probs.max(axis=-1).astype(np.float64))
        gaps = confidence - row_correct(log_probs, labels)
        return cls._grouped(confidence[:, None], gaps[:, None], bins, units)

    @classmethod
    def classwise(cls, log_probs: Floats, labels: Ints, bins: int, units: Ints | None = None) -> CalibrationError:
        """Of every class."""
        return cls._grouped(*_of_classes(log_probs, labels), bins, units)

    @classmethod
    def _grouped(cls, said: Floats, gaps: Floats, bins: int, units: Ints | None) -> CalibrationError:
        numbers = np.arange(gaps.shape[-1]) if units is None else units
        count = bin_count(int(numbers.max()) + 1, bins)
        binned = np.stack([[equal_mass_bins(one, count) for one in group] for group in said])
        return cls(gaps, binned, numbers)

    def point(self) -> float:
        """Mean over predictors."""
        ones = np.ones((1, int(self.units.max()) + 1))
        return float(np.mean([self._weighted(ones, predictor) for predictor in range(len(self.gaps))]))

    def resampled(self, weights: Floats) -> Floats:
        """Resample s scores predictor s mod Q."""
        _, first_rows = np.unique(self.units, return_index=True)
        by_unit, found, predictors = weights[:, first_rows], np.empty(len(weights)), len(self.gaps)
        for predictor in range(min(predictors, len(weights))):
            found[predictor::predictors] = self._weighted(by_unit[predictor::predictors], predictor)
        return found

    def _weighted(self, weights: Floats, predictor: int) -> Floats:
        """Under weights (S, U) of the units: (S,)."""
        squares, square = weights**2, np.zeros(len(weights))
        for gaps, bins in zip(self.gaps[predictor], self.bins[predictor], strict=True):
            sums, counts = self._per_unit(gaps, bins)
            mass = weights @ counts
            pairs = mass**2 - squares @ counts**2  # weight of the pairs of different units
            products = (weights @ sums) ** 2 - squares @ sums**2
            unbiased = np.divide(products, pairs, out=np.zeros_like(products), where=pairs > 0.5)
            square += (mass * unbiased).sum(axis=1) / mass.sum(axis=1)
        return np.sqrt(np.maximum(square / self.gaps.shape[1], 0.0))

    def _per_unit(self, gaps: Floats, bins: Ints) -> tuple[Floats, Floats]:
        """(U, B) sum of the gaps, and number of rows, of each unit in each bin."""
        shape = int(self.units.max()) + 1, int(bins.max()) + 1
        cells, size = self.units * shape[1] + bins, shape[0] * shape[1]
        sums, counts = np.bincount(cells, weights=gaps, minlength=size), np.bincount(cells, minlength=size)
        return sums.astype(np.float64).reshape(shape), counts.astype(np.float64).reshape(shape)


@dataclass(frozen=True)
class PluginCalibrationError:
    """An ECE as the literature prints it: mean over K groups of sum_b (n_b / N) |mean gap of bin b|: a
    `bootstrap.Statistic`. Biased upwards: see `sampling_interval`.

    `of`: the top choice, in bins of equal width (arXiv 1706.04599). `classwise`: every class, in bins of equal width
    (arXiv 1910.12656; the static error of arXiv 1904.01685). `adaptive`: every class, in bins of equal mass (ACE,
    arXiv 1904.01685, where a bin weighs 1 / B: equal masses but for ties, which stay together here).
    """

    gaps: Floats
    """(Q, K, N)."""
    bins: Ints
    """(Q, K, N)."""

    @classmethod
    def of(cls, log_probs: Floats, labels: Ints, bins: int = PLUGIN_BINS) -> PluginCalibrationError:
        """From log_probs (Q, N, C)."""
        confidence = np.exp(log_probs.max(axis=-1).astype(np.float64))
        gaps = confidence - row_correct(log_probs, labels)
        return cls(gaps[:, None], _equal_width_bins(confidence[:, None], bins))

    @classmethod
    def classwise(cls, log_probs: Floats, labels: Ints, bins: int = PLUGIN_BINS) -> PluginCalibrationError:
        """From log_probs (Q, N, C); a choice that a row lacks has a gap of 0."""
        said, gaps = _of_classes(log_probs, labels)
        return cls(gaps, _equal_width_bins(said, bins))

    @classmethod
    def adaptive(cls, log_probs: Floats, labels: Ints, bins: int = PLUGIN_BINS) -> PluginCalibrationError:
        """From log_probs (Q, N, C); a choice that a row lacks has a gap of 0."""
        said, gaps = _of_classes(log_probs, labels)
        return cls(gaps, np.stack([[equal_mass_bins(one, bins) for one in group] for group in said]))

    def point(self) -> float:
        """Mean over predictors."""
        ones = np.ones((1, self.gaps.shape[-1]))
        return float(np.mean([self._weighted(ones, predictor) for predictor in range(len(self.gaps))]))

    def resampled(self, weights: Floats) -> Floats:
        """Resample s scores predictor s mod Q."""
        found, predictors = np.empty(len(weights)), len(self.gaps)
        for predictor in range(min(predictors, len(weights))):
            found[predictor::predictors] = self._weighted(weights[predictor::predictors], predictor)
        return found

    def _weighted(self, weights: Floats, predictor: int) -> Floats:
        total = np.zeros(len(weights))
        for gaps, bin_of_row in zip(self.gaps[predictor], self.bins[predictor], strict=True):
            inside = (bin_of_row[:, None] == np.unique(bin_of_row)).astype(np.float64)  # (N, bins)
            total += np.abs(weights @ (gaps[:, None] * inside)).sum(axis=1)
        return total / (self.gaps.shape[1] * weights.sum(axis=1))


def sampling_interval(value: float, resamples: Floats) -> Interval:
    """Where the plug-in ECE of another sample of as many rows would lie, its bias included: resamples, which are biased
    once more, are moved to have `value` as their mean."""
    found = percentile_interval(value, np.maximum(resamples - resamples.mean() + value, 0.0))
    return Interval(found.value, min(found.low, value), max(found.high, value))


def ece(log_probs: Floats, labels: Ints, bins: int = 15, units: Ints | None = None) -> float:
    """`CalibrationError` of one predictor (N, C)."""
    return CalibrationError.of(log_probs[None], labels, bins, units).point()


def plugin_ece(log_probs: Floats, labels: Ints, bins: int = PLUGIN_BINS) -> float:
    """`PluginCalibrationError` of one predictor (N, C)."""
    return PluginCalibrationError.of(log_probs[None], labels, bins).point()


@dataclass(frozen=True)
class Reliability:
    """Points of a reliability diagram: per non-empty bin the mean confidence, the accuracy and the rows."""

    confidence: Floats
    accuracy: Floats
    rows: Ints


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


def _equal_width_bins(said: Floats, bins: int) -> Ints:
    """Bin of each probability, (a, b] as in arXiv 1706.04599; 0 is in the first: the shape of `said`."""
    return (np.ceil(said * bins).astype(np.int64) - 1).clip(0, bins - 1)


def _of_classes(log_probs: Floats, labels: Ints) -> tuple[Floats, Floats]:
    """(Q, C, N) probability of every class, and its gap."""
    said = np.exp(log_probs.astype(np.float64)).swapaxes(-1, -2)
    return said, said - (labels == np.arange(said.shape[1])[:, None])


def bin_count(units: int, bins: int) -> int:
    """Bins in use: at most one for every two independent units."""
    return max(1, min(bins, units // 2))
