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
