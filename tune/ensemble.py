"""The adapter ensemble of a search, chosen from cached validation predictions: no training, no forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import (
    DataConfig,
    LabelledSplit,
    RunFolderError,
    RunPaths,
    average,
    choose_adapters,
    choose_cheapest,
    join_labels,
    load_splits,
    read_predictions,
)
from tune.ledger import TrialRecord
from tune.trial import TRIALS


def validation_losses(
    data: DataConfig, folder: Path, finished: Sequence[TrialRecord], by: str
) -> tuple[list[LabelledSplit], list[float]]:
    """Each finished trial's validation predictions, and what `select.by` makes of them; less is better.

    Raises:
        RunFolderError: a trial's predictions are damaged, or not of the validation rows in the order of the others'.
        ConfigError: the rows have no such score.
    """
    splits = _labelled(data, folder, finished)
    return splits, [split.loss(split.outputs[:1], by).point() for split in splits]


def choose_ensemble(
    splits: Sequence[LabelledSplit], names: Sequence[str], space: Literal["probability", "logit"], most: int, by: str
) -> dict[str, Any]:
    """Greedy forward selection among trials, at most `most` of them; the smallest ensemble within one paired standard
    error of the best one wins, a single adapter included.

    `by_size` holds the validation loss of ensembles of growing size, in the order of the selection.

    Args:
        splits: each trial's validation predictions.
        names: the trials.
        by: `select.by`.
    """
    first, outputs = splits[0], [split.outputs[0] for split in splits]
    averaged = first.averaging_space(space)
    order = choose_adapters(outputs, most, lambda one: first.loss(one[None], by).point(), averaged)
    stack, sizes = np.stack([outputs[k] for k in order]), range(1, len(order) + 1)
    losses = [first.loss(average(stack[:size], averaged)[None], by) for size in sizes]
    chosen = sizes[choose_cheapest(sizes, losses, first.rows, first.units)]
    return {
        "adapters": [names[k] for k in order[:chosen]],
        "size": chosen,
        "selected_by": by,
        "validation_loss": losses[chosen - 1].point(),
        "by_size": {str(size): loss.point() for size, loss in zip(sizes, losses, strict=True)},
    }


def _labelled(data: DataConfig, folder: Path, finished: Sequence[TrialRecord]) -> list[LabelledSplit]:
    """Each trial's validation predictions with their labels."""
    cached = [read_predictions(RunPaths(folder / TRIALS / r.name).predictions, "validation") for r in finished]
    rows, splits = load_splits(data).validation, []
    for record, predictions in zip(finished, cached, strict=True):
        where = f"{record.name}: predictions"
        if predictions.row_ids != cached[0].row_ids:
            raise RunFolderError(where, None, "are of other rows than the other trials'", "Search in a new folder.")
        splits.append(join_labels(predictions, rows, where))
    return splits
