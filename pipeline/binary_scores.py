"""Scores of two-class tasks that GLUE reports beside accuracy. Pure numpy; the positive class is label 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.scores import Floats, Ints


@dataclass(frozen=True)
class BinaryScore:
    """Matthews' correlation (CoLA) or F1 of label 1 (MRPC, QQP): a `scores.Statistic`.

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
