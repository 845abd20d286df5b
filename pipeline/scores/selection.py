"""By what validation rows choose between settings, adapters and ensemble sizes: losses, of which less is better."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.scores import temperature
from pipeline.scores.bootstrap import Floats, Ints, Negative, RowMean, Statistic
from pipeline.scores.classification import BinaryScore, row_correct, row_nll
from pipeline.scores.regression import Correlation, row_squared_error

SelectBy = Literal["nll_scaled", "nll", "accuracy", "matthews", "f1", "pearson", "spearman"]

SELECTION_NAMES: dict[SelectBy, str] = {
    "nll_scaled": "NLL under a cross-fitted temperature", "nll": "NLL", "accuracy": "accuracy",
    "matthews": "Matthews' correlation", "f1": "F1", "pearson": "Pearson's correlation",
    "spearman": "Spearman's correlation",
}


def selection_name(by: SelectBy, kind: str) -> str:
    """What `select.by` means for rows of a kind, in words: only choices have a temperature."""
    if kind == "choice" or not by.startswith("nll"):
        return SELECTION_NAMES[by]
    return "mean squared error" if kind == "regression" else SELECTION_NAMES["nll"]


def choice_loss(by: SelectBy, log_probs: Floats, labels: Ints, units: Ints | None) -> Statistic:
    """Of Q predictors (Q, N, C); the mean over them where the loss is a mean over rows."""
    if by == "accuracy":
        return _mean(1.0 - row_correct(log_probs, labels))
    if by in ("matthews", "f1"):
        return Negative(BinaryScore.of(log_probs, labels, "f1" if by == "f1" else "matthews"))
    scaled = cross_scaled(log_probs, labels, units) if by == "nll_scaled" else log_probs
    return _mean(row_nll(scaled, labels))


def regression_loss(by: SelectBy, values: Floats, scores: Floats) -> Statistic:
    """Of Q predictors (Q, N, 1). The squared error orders predictors as the NLL under their best variance does."""
    if by in ("pearson", "spearman"):
        return Negative(Correlation(values[..., 0], scores, "spearman" if by == "spearman" else "pearson"))
    return _mean(row_squared_error(values, scores))


def cross_scaled(log_probs: Floats, labels: Ints, units: Ints | None = None) -> Floats:
    """(Q, N, C) with every row scaled by a temperature that rows of other units decided: (Q, N, C).

    The units are halved (every second one), and each half is scaled by the temperature of the other. So two predictors
    that differ in sharpness alone have nearly the same loss, and none is judged by rows that its temperature has seen.
    """
    scaled = log_probs.astype(np.float64)
    even, odd = halves(len(labels), units)
    if not (even.any() and odd.any()):
        return scaled
    for own, other in ((even, odd), (odd, even)):
        shared = None if units is None else units[other]
        fitted = temperature.fit_temperatures(log_probs[:, other], labels[other], units=shared)
        scaled[:, own] = temperature.apply_temperature(log_probs[:, own], fitted)
    return scaled


def halves(rows: int, units: Ints | None = None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of N rows are of the even, and of the odd units: (N,) twice. What one half decides, the other may judge."""
    even = (np.arange(rows) if units is None else units) % 2 == 0
    return even, ~even


def _mean(values: Floats) -> RowMean:
    return RowMean(values.mean(axis=0, keepdims=True))
