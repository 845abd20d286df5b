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
    choose_adapters,
    ensemble_nll,
    join_labels,
    load_splits,
    read_predictions,
)
from tune.ledger import TrialRecord
from tune.trial import TRIALS


def choose_ensemble(
    data: DataConfig, average: Literal["probability", "logit"], most: int, folder: Path, finished: Sequence[TrialRecord]
) -> dict[str, Any]:
    """Greedy forward selection among the finished trials (best first), at most `most` of them.

    `by_size` holds the validation NLL of ensembles of growing size: the chosen adapters in the order of their
    choice, then the best of the others.

    Raises:
        RunFolderError: a trial's predictions are damaged, or not of the validation rows in the order of the others'.
    """
    splits = _labelled(data, folder, finished)
    labels, space = splits[0].labels, splits[0].averaging_space(average)
    outputs = [split.outputs[0] for split in splits]
    chosen = choose_adapters(outputs, labels, most, space)
    order = [*chosen, *(k for k in range(len(finished)) if k not in chosen)][:most]
    stack = np.stack([outputs[k] for k in order])
    by_size = {str(size): ensemble_nll(stack[:size], labels, space) for size in range(1, len(order) + 1)}
    return {
        "adapters": [finished[k].name for k in chosen],
        "size": len(chosen),
        "validation_nll": by_size[str(len(chosen))],
        "by_size": by_size,
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
