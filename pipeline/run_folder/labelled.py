"""Predictions joined with the labels of their rows: the one place where the two meet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.evaluate import check_selection
from pipeline.errors import RunFolderError
from pipeline.run_folder.predictions import EVALUATE_AGAIN, Kind, Predictions
from pipeline.scores.bootstrap import Floats, Ints, RowMean, Statistic, unit_count
from pipeline.scores.ensemble import Space
from pipeline.scores.selection import SelectBy, choice_loss, halves, regression_loss


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
    """(N,) number of the unit (question, document) each row belongs to: rows that share one are not independent.
    None: all differ."""
    kind: Kind = "choice"
    own_space: Space | None = None
    """The one space in which these members can be averaged; None: any."""
    raters: Floats | None = None
    """(N, C) share of the people asked who chose each choice; None where not every row says."""

    @property
    def rows(self) -> int:
        """N."""
        return len(self.labels) if self.offsets is None else len(self.offsets) - 1

    def averaging_space(self, configured: Space) -> Space:
        """The space in which members are averaged: `configured` (`ensemble.average`), where these have a choice."""
        return self.own_space or configured

    @property
    def unit_count(self) -> int:
        """Independent units among the rows."""
        return unit_count(self.rows, self.units)

    @property
    def first_of_units(self) -> Ints:
        """The first row of each independent unit."""
        return np.arange(self.rows) if self.units is None else np.unique(self.units, return_index=True)[1]

    def halves(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which cells are of rows of the even, and of the odd units (`selection: halves`): (L,) twice."""
        even, odd = halves(self.rows, self.units)
        if self.offsets is None:
            return even, odd
        return np.repeat(even, np.diff(self.offsets)), np.repeat(odd, np.diff(self.offsets))

    def loss(self, outputs: Floats, by: SelectBy) -> Statistic:
        """By what these rows choose between predictors: less is better.

        Args:
            outputs: (Q, L, C), of candidates for one place: their mean, where the loss is a mean over rows.

        Raises:
            ConfigError: rows of this kind have no such score.
        """
        check_selection(by, self.kind, outputs.shape[-1])
        if self.kind == "regression":
            return regression_loss(by, outputs, self.labels)
        if self.kind == "completion":
            return self.row_mean(-outputs[..., 0].mean(axis=0, keepdims=True))
        return choice_loss(by, outputs, self.labels, self.units)

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
        units=independent_units([row.unit or row.question or row.id for row in ordered]),
        own_space=predictions.own_space,
        kind=predictions.kind,
        raters=rater_shares([row.label_counts for row in ordered], predictions.outputs.shape[-1]),
    )


def rater_shares(counts: Sequence[tuple[float, ...]], choices: int) -> Floats | None:
    """(N, C) shares of counts per row; None where a row has none."""
    if not all(counts):
        return None
    table = np.array([[*one, *[0.0] * (choices - len(one))] for one in counts])
    return table / table.sum(axis=1, keepdims=True)


def independent_units(names: Sequence[str]) -> Ints | None:
    """(N,) number of each row's unit, in order of appearance; None where no two rows share one."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return None if len(numbers) == len(names) else np.array([numbers[name] for name in names])
