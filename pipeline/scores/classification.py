"""Scores of predicted choices.

Shapes: log_probs (..., N, C), natural logarithms normalised over the C choices, -inf for a choice that
a row does not have; labels (N,), indices of the right choices. Leading axes are other predictors and
are kept. NLL is in nats; a Brier score is the sum over classes, in [0, 2].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.scores.bootstrap import Floats, Ints


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


def _over_predictors(log_probs: Floats, score: Callable[[Floats], float]) -> Floats:
    """`score` of every (N, C) in (..., N, C): (...)."""
    flat = log_probs.reshape(-1, *log_probs.shape[-2:])
    return np.array([score(one) for one in flat]).reshape(log_probs.shape[:-2])


@dataclass(frozen=True)
class BinaryScore:
    """Matthews' correlation (CoLA) or F1 of label 1 (MRPC, QQP): a `bootstrap.Statistic`.

    With the counts of a 2 × 2 table, MCC = (tp·tn - fp·fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) and
    F1 = 2·tp / (2·tp + fp + fn); 0 where that is 0/0, as in scikit-learn.
    """

    chosen: Floats
    """(Q, N) 1 where a predictor chooses label 1, else 0."""
    labels: Ints
    """(N,)."""
    kind: Literal["matthews", "f1"]

    @classmethod
    def of(cls, log_probs: Floats, labels: Ints, kind: Literal["matthews", "f1"]) -> BinaryScore:
        """From log_probs (Q, N, 2)."""
        return cls(log_probs.argmax(axis=-1).astype(np.float64), labels, kind)

    def point(self) -> float:
        """Mean over predictors."""
        ones = np.ones((1, len(self.labels)))
        return float(np.mean([self._weighted(ones, chosen) for chosen in self.chosen]))

    def resampled(self, weights: Floats) -> Floats:
        """Resample s scores predictor s mod Q."""
        found = np.empty(len(weights))
        for predictor, chosen in enumerate(self.chosen):
            found[predictor :: len(self.chosen)] = self._weighted(weights[predictor :: len(self.chosen)], chosen)
        return found

    def _weighted(self, weights: Floats, chosen: Floats) -> Floats:
        right = self.labels.astype(np.float64)
        tp, fp = weights @ (chosen * right), weights @ (chosen * (1.0 - right))
        fn, tn = weights @ ((1.0 - chosen) * right), weights @ ((1.0 - chosen) * (1.0 - right))
        if self.kind == "f1":
            above, below = 2.0 * tp, 2.0 * tp + fp + fn
        else:
            above, below = tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return np.divide(above, below, out=np.zeros_like(below), where=below > 0.0)
