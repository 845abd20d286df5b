"""Predictions joined with the labels of their rows: the one place where the two meet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RunFolderError
from pipeline.run_folder.predictions import EVALUATE_AGAIN, Predictions
from pipeline.scores.bootstrap import Floats, Ints, RowMean
from pipeline.scores.ensemble import Space


@dataclass(frozen=True)
class LabelledSplit:
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
    own_space: Space | None = None
    """The one space in which these members can be averaged; None: any."""

    @property
    def rows(self) -> int:
        """N."""
        return len(self.labels) if self.offsets is None else len(self.offsets) - 1

    def averaging_space(self, configured: Space) -> Space:
        """The space in which members are averaged: `configured` (`ensemble.average`), where these have a choice."""
        return self.own_space or configured

    def row_mean(self, cell_values: Floats) -> RowMean:
        """The mean per cell of (Q, L) values, as a statistic of the N independent rows."""
        if self.offsets is None:
            return RowMean(cell_values)
        return RowMean(np.add.reduceat(cell_values, self.offsets[:-1], axis=1), np.diff(self.offsets))


def join_labels(predictions: Predictions, rows: Iterable[Any], where: str) -> LabelledSplit:
    """Predictions with the right answers of their rows, found by row id.

    Args:
        rows: of the split, in any order.
        where: names the predictions in an error.

    Raises:
        RunFolderError: rows and predictions differ, or a row's right answer was not predicted.
    """
    by_id = {row.id: row for row in rows}
    unknown = sum(row_id not in by_id for row_id in predictions.row_ids)
    missing = len(by_id) - (len(predictions.row_ids) - unknown)
    if unknown or missing:
        what = f"has {unknown} rows that the data lack, and lacks {missing} rows of the data"
        raise RunFolderError(where, None, what, EVALUATE_AGAIN)
    ordered = [by_id[row_id] for row_id in predictions.row_ids]
    return LabelledSplit(
        outputs=predictions.outputs,
        labels=predictions.right_answers(ordered, where),
        offsets=predictions.first_cells,
        seconds=predictions.seconds,
        units=independent_units([row.question or row.id for row in ordered]),
        own_space=predictions.own_space,
    )


def independent_units(questions: Sequence[str]) -> Ints | None:
    """(N,) number of each row's question, in order of appearance; None where no two rows share one."""
    numbers = {question: number for number, question in enumerate(dict.fromkeys(questions))}
    return None if len(numbers) == len(questions) else np.array([numbers[question] for question in questions])
