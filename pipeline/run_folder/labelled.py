"""Predictions joined with the labels of their rows: the one place where the two meet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RunFolderError
from pipeline.run_folder.predictions import ChoicePredictions, Predictions, RegressionPredictions
from pipeline.scores.bootstrap import Floats, Ints, RowMean

EVALUATE_AGAIN = "The data or their configuration changed after the predictions were made: evaluate again."


@dataclass(frozen=True)
class ScoredSplit:
    """Predictions of one split with their labels, in L cells.

    A cell is a row of choice data; for completion data it is a token of a reference answer, taken as a choice
    of which only the right one is known (C = 1, label 0); for regression it is a row (C = 1).
    """

    outputs: Floats
    """(M, L, C) log-probabilities; (M, L, 1) values of regression."""
    labels: NDArray[Any]
    """(L,) indices of the right choices; the right numbers of regression."""
    offsets: Ints | None
    """(N + 1,) first cell of each row; None where a row is one cell."""
    seconds: float
    units: Ints | None = None
    """(N,) index of the question each row belongs to: rows that share one are not independent. None: all differ."""

    @property
    def rows(self) -> int:
        """N."""
        return len(self.labels) if self.offsets is None else len(self.offsets) - 1

    def row_mean(self, cell_values: Floats) -> RowMean:
        """The mean per cell of (Q, L) values, as a statistic of the N independent rows."""
        if self.offsets is None:
            return RowMean(cell_values)
        return RowMean(np.add.reduceat(cell_values, self.offsets[:-1], axis=1), np.diff(self.offsets))


def join_labels(predictions: Predictions, rows: Iterable[Any], path: Path) -> ScoredSplit:
    """Labels by row id.

    Raises:
        RunFolderError: rows and predictions differ, or a label is not among the predicted choices.
    """
    by_id = {row.id: row for row in rows}
    unknown = sum(row_id not in by_id for row_id in predictions.row_ids)
    missing = len(by_id) - (len(predictions.row_ids) - unknown)
    if unknown or missing:
        what = f"has {unknown} rows that the data lack, and lacks {missing} rows of the data"
        raise RunFolderError(str(path), None, what, EVALUATE_AGAIN)
    units = independent_units([by_id[row_id].question or row_id for row_id in predictions.row_ids])
    if isinstance(predictions, RegressionPredictions):
        right = np.array([by_id[row_id].score for row_id in predictions.row_ids], dtype=np.float64)
        if not np.isfinite(right).all():
            raise RunFolderError(str(path), None, "has predictions of rows without a score", EVALUATE_AGAIN)
        return ScoredSplit(predictions.values[..., None], right, None, predictions.seconds, units)
    if not isinstance(predictions, ChoicePredictions):
        tokens = predictions.token_log_probs.shape[1]
        no_choice = np.zeros(tokens, dtype=np.int64)
        return ScoredSplit(
            predictions.token_log_probs[..., None], no_choice, predictions.offsets, predictions.seconds, units
        )
    labels = [by_id[row_id].label for row_id in predictions.row_ids]
    choices = predictions.log_probs.shape[2]
    for row_id, label, logs in zip(predictions.row_ids, labels, predictions.log_probs.swapaxes(0, 1), strict=True):
        if label is None or not 0 <= label < choices or not np.isfinite(logs[:, label]).all():
            what = f"has no prediction for the label {label}"
            raise RunFolderError(f"{path}, row {row_id}", None, what, EVALUATE_AGAIN)
    return ScoredSplit(predictions.log_probs, np.array(labels), None, predictions.seconds, units)


def independent_units(questions: Sequence[str]) -> Ints | None:
    """(N,) number of each row's question, in order of appearance; None where no two rows share one."""
    numbers = {question: number for number, question in enumerate(dict.fromkeys(questions))}
    return None if len(numbers) == len(questions) else np.array([numbers[question] for question in questions])
