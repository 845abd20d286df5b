"""The scores by which training selects, for each kind of prediction. Shapes as in `classification` and `regression`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from pipeline.scores.bootstrap import Floats, Ints
from pipeline.scores.classification import accuracy, nll
from pipeline.scores.regression import Correlation, gaussian_nll, row_squared_error


def choice_scores(log_probs: Floats, labels: Ints) -> dict[str, float]:
    """Of (N, C): NLL in nats per row, accuracy."""
    return {"nll": float(nll(log_probs, labels)), "accuracy": float(accuracy(log_probs, labels))}


def completion_scores(token_log_probs: Floats, labels: Ints) -> dict[str, float]:
    """Of (T, 1): NLL in nats per token; the one choice of a token is the right one."""
    return {"nll": float(-token_log_probs[:, 0].mean())}


def regression_scores(values: Floats, scores: Floats) -> dict[str, float]:
    """Of (N, 1): NLL in nats per row of a Gaussian with the best variance, root mean squared error, Pearson's
    correlation. The NLL orders predictors as the mean squared error does."""
    rmse = float(row_squared_error(values, scores).mean() ** 0.5)
    pearson = Correlation(values.T, scores, "pearson").point()
    return {"nll": float(gaussian_nll(values, scores)), "rmse": rmse, "pearson": pearson}


VALIDATION_SCORES: dict[str, Callable[[Floats, NDArray[Any]], dict[str, float]]] = {
    "choice": choice_scores,
    "completion": completion_scores,
    "regression": regression_scores,
}
"""Kind of prediction -> outputs (L, C) of one member and right answers (L,) -> its scores; `nll` is in all of them."""
