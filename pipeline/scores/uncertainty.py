"""Whether uncertainty finds errors and foreign rows: AUROC, and risk by coverage with the area under it. Pure numpy.

`doubt` (..., N) is any number per row, the higher the less sure: minus the confidence, an entropy, a mutual
information; it may be infinite, not NaN. Rows that doubt cannot tell apart stand in every order: what is given is the
mean over these orders, so that neither the order of a file nor a sort decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.scores.bootstrap import Floats, Ints


def doubt_of_choice(log_probs: Floats) -> Floats:
    """-log of the highest probability, which orders rows as 1 - confidence does: (..., N, C) -> (..., N)."""
    return -log_probs.max(axis=-1).astype(np.float64)


@dataclass(frozen=True)
class Auroc:
    """P(doubt of a positive row > that of a negative one) + P(equal) / 2, the area under the ROC curve (Fawcett 2006,
    doi 10.1016/j.patrec.2005.10.010): a `bootstrap.Statistic`.

    Positive are the rows that doubt should find: those answered wrongly, or those of another domain. NaN, in a resample
    too, where all rows are positive or none is.
    """

    doubt: Floats
    """(Q, N)."""
    positive: Floats
    """(Q, N) 1 or 0."""

    def point(self) -> float:
        """Mean over the predictors that have one."""
        return _point(self._weighted, self.doubt)

    def resampled(self, weights: Floats) -> Floats:
        """Resample s scores predictor s mod Q."""
        return _by_predictor(weights, len(self.doubt), self._weighted)

    def _weighted(self, weights: Floats, predictor: int) -> Floats:
        positive, negative = _masses(self.doubt[predictor], self.positive[predictor], weights)
        surer = np.cumsum(negative, axis=1) - negative / 2.0
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        found = np.full(len(weights), math.nan)
        return np.divide((positive * surer).sum(axis=1), pairs, out=found, where=pairs > 0.0)


@dataclass(frozen=True)
class RiskCoverageArea:
    """Area under the risk-coverage curve (AURC): the mean over k = 1..N of the error rate among the k surest rows.

    `aurc`: that area (Geifman, Uziel & El-Yaniv, arXiv 1805.08206, after arXiv 1705.08500). `e_aurc`: what it is above
    the least that so many errors allow, which is reached where every wrong row stands behind every right one; there
    (1/N) sum_{j=1}^{W} j / (N - W + j) for W errors, of which the paper's r + (1 - r) log(1 - r) is the limit.

    A group of n equally doubtful rows, e of them wrong, behind `a` rows with E errors adds the mean over its orders,
    sum_{k=a+1}^{a+n} (E + (k - a) e/n) / k, a difference of harmonic numbers. A `bootstrap.Statistic`, for weights that
    are counts: a row that was drawn twice is two equally doubtful rows.
    """

    doubt: Floats
    """(Q, N)."""
    wrong: Floats
    """(Q, N) 1 or 0."""
    kind: Literal["aurc", "e_aurc"]

    def point(self) -> float:
        """Mean over predictors."""
        return _point(self._weighted, self.doubt)

    def resampled(self, weights: Floats) -> Floats:
        """Resample s scores predictor s mod Q."""
        return _by_predictor(weights, len(self.doubt), self._weighted)

    def _weighted(self, weights: Floats, predictor: int) -> Floats:
        wrong, right = _masses(self.doubt[predictor], self.wrong[predictor], weights)
        rows = wrong + right
        behind, errors = np.cumsum(rows, axis=1), np.cumsum(wrong, axis=1) - wrong
        before = behind - rows
        total, failed = behind[:, -1], errors[:, -1] + wrong[:, -1]
        harmonic = np.append(0.0, np.cumsum(1.0 / np.arange(1, int(total.max()) + 1)))
        rate = np.divide(wrong, rows, out=np.zeros_like(wrong), where=rows > 0.0)
        span = harmonic[behind.astype(np.intp)] - harmonic[before.astype(np.intp)]
        area = ((errors - before * rate) * span + wrong).sum(axis=1)
        if self.kind == "e_aurc":
            kept = total - failed
            area -= failed - kept * (harmonic[total.astype(np.intp)] - harmonic[kept.astype(np.intp)])
            area = np.maximum(area, 0.0)  # below by rounding alone
        return area / total


def risk_coverage(doubt: Floats, wrong: Floats) -> tuple[Floats, Floats]:
    """The curve of one predictor (N,): coverage k / N, and the error rate among the k surest rows, k = 1..N."""
    order, starts = _ties(doubt)
    sizes = np.diff(np.append(starts, len(doubt)))
    rates = np.add.reduceat(wrong[order].astype(np.float64), starts) / sizes  # over a group's orders
    taken = np.arange(1, len(doubt) + 1)
    return taken / len(doubt), np.cumsum(np.repeat(rates, sizes)) / taken


def _masses(doubt: Floats, marked: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """(S, G) weight of the marked rows, and of the others, among each group of equally doubtful rows, surest first."""
    order, starts = _ties(doubt)
    everything = weights[:, order]
    those = everything * marked[order]
    if len(starts) < len(order):
        everything, those = (np.add.reduceat(mass, starts, axis=1) for mass in (everything, those))
    return those, everything - those


def _ties(doubt: Floats) -> tuple[Ints, Ints]:
    """(N,) rows, surest first; (G,) where in that order each group of equally doubtful ones begins."""
    order = np.argsort(doubt, kind="stable")
    found = doubt[order]
    return order, np.flatnonzero(np.append(True, found[1:] != found[:-1]))


def _point(score: Callable[[Floats, int], Floats], doubt: Floats) -> float:
    ones = np.ones((1, doubt.shape[1]))
    found = np.array([float(score(ones, predictor)[0]) for predictor in range(len(doubt))])
    defined = found[~np.isnan(found)]
    return float(defined.mean()) if len(defined) else math.nan


def _by_predictor(weights: Floats, predictors: int, score: Callable[[Floats, int], Floats]) -> Floats:
    found = np.empty(len(weights))
    for predictor in range(min(predictors, len(weights))):
        found[predictor::predictors] = score(weights[predictor::predictors], predictor)
    return found
