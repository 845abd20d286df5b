"""Which rows to answer, so that answers are wrong at most so often: selective prediction with a guarantee.

A row is answered where its confidence reaches a threshold t; R(t) = P(wrong | confidence >= t) is an answer's risk.
On n labelled rows, of which n_t reach t and k_t of those are answered wrongly, k_t given n_t is binomial with R(t), so
R(t) <= r is shown at level 1 - d where P(Bin(n_t, r) <= k_t) <= d: where the upper bound of Clopper and Pearson
(1934), Beta^-1(1 - d; k_t + 1, n_t - k_t), is at most r.

Thresholds are tested one after another, from the most confident rows on, until one fails (fixed-sequence testing, the
"learn then test" of Angelopoulos et al., arXiv 2110.01052). With d / J for each of J sequences, which begin at as many
places, P(R(t) > r) <= d for the threshold t that is chosen, of however many. That holds where

- the rows are independent draws of what is to be answered, and neither confidences nor thresholds were made with them;
- thresholds are a fixed list: quantiles of the confidences of other rows (`candidates`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from pipeline.scores.bootstrap import Floats

LEVEL = 0.95
"""With which the risk is at most the promised one."""
STARTS = (0.25, 0.5, 0.75, 1.0)
"""Where sequences may begin: shares of the thresholds. Those where so few rows are expected that even without a wrong
one they would show nothing begin none, and leave more of d to the others."""
GRID = 100
"""Thresholds, at most."""


@dataclass(frozen=True)
class Threshold:
    """A confidence from which on rows are answered, and what is known of it."""

    confidence: float
    risk: float
    """The promised one: r."""
    level: float
    """1 - d."""
    rows: int
    """Labelled rows: n."""
    answered: int
    """Of these: n_t."""
    wrong: int
    """Of those: k_t."""

    @property
    def guarantee(self) -> str:
        """What is promised, in a sentence."""
        return (
            f"with {self.level:.0%} confidence, at most {self.risk:.1%} of answers are wrong in rows like the"
            f" calibration rows ({self.wrong} of the {self.answered} answered there were, of {self.rows})"
        )


def candidates(confidence: Floats) -> Floats:
    """Thresholds in the order of testing, from the confidences (N,) of rows that no risk is measured on: (K,) falling.

    They answer 1/100, 2/100, … of these rows; the last one, 0, answers every row.
    """
    shares = np.arange(1, GRID) / GRID
    found = np.unique(np.quantile(confidence.astype(np.float64), 1.0 - shares))[::-1]
    return np.append(found, 0.0)


def choose_threshold(
    confidence: Floats, correct: NDArray[np.bool_], thresholds: Floats, risk: float, level: float = LEVEL
) -> Threshold | None:
    """The lowest threshold of which it is shown that R(t) <= `risk`; None where it is shown of none.

    Args:
        confidence: (N,) of labelled rows.
        correct: (N,) whether the answer that would be given is right.
        thresholds: (K,) falling, as `candidates` makes them of other rows.
        risk: between 0 and 1.
    """
    starts = _starts(len(thresholds), len(confidence), risk, 1.0 - level)
    reached = confidence[None, :] >= thresholds[:, None]
    answered, wrong = reached.sum(axis=1), (reached & ~correct).sum(axis=1)
    shown = _shown(upper_bounds(answered, wrong, 1.0 - (1.0 - level) / len(starts)) <= risk, starts)
    if shown is None:
        return None
    return Threshold(
        float(thresholds[shown]), risk, level, len(confidence), int(answered[shown]), int(wrong[shown])
    )


def least_risk(
    confidence: Floats, correct: NDArray[np.bool_], thresholds: Floats, level: float = LEVEL
) -> float | None:
    """The smallest of the risks 0.5 %, 1 %, … for which `choose_threshold` finds a threshold; None: for none."""
    risks = (step / 200 for step in range(1, 200))
    return next((r for r in risks if choose_threshold(confidence, correct, thresholds, r, level) is not None), None)


def upper_bounds(answered: NDArray[np.int64], wrong: NDArray[np.int64], level: float) -> Floats:
    """Clopper-Pearson's one-sided upper bounds of the risk; 1 where nothing, or nothing right, was answered."""
    right = answered - wrong
    return np.where(right > 0, betaincinv(wrong + 1, np.maximum(right, 1), level), 1.0)


def _starts(count: int, rows: int, risk: float, error: float) -> list[int]:
    """Indices of the thresholds at which sequences begin: J of them."""
    needed = math.log(error / len(STARTS)) / math.log1p(-risk)  # rows that show the risk where none is wrong
    shares = [share for share in STARTS if share * rows >= needed] or STARTS[-1:]
    return [max(1, math.ceil(count * share)) - 1 for share in shares]


def _shown(passes: NDArray[np.bool_], starts: list[int]) -> int | None:
    """Index of the last threshold that any sequence reaches: each goes on until its first failure."""
    reached = None
    for start in starts:
        failures = np.flatnonzero(~passes[start:])
        end = start + int(failures[0]) if len(failures) else len(passes)
        if end > start:
            reached = end - 1
    return reached
