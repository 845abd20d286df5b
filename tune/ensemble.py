"""The adapter ensemble of a search, chosen from cached validation predictions: no training, no forward pass.

K adapters, N rows, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import (
    RunConfig,
    RunFolderError,
    RunPaths,
    average,
    choose_adapters,
    gaussian_nll,
    load_splits,
    nll,
    read_predictions,
)
from tune.ledger import TrialRecord
from tune.trial import TRIALS


def choose_ensemble(config: RunConfig, folder: Path, finished: Sequence[TrialRecord]) -> dict[str, Any]:
    """Greedy forward selection among the finished trials (best first), at most `search.adapters` of them.

    `by_size` holds the validation NLL of ensembles of growing size: the chosen adapters in the order of their
    choice, then the best of the others.

    Raises:
        RunFolderError: the trials' predictions are not of the same rows.
    """
    log_probs, labels, space = _cached(config, folder, finished)
    chosen = choose_adapters(log_probs, labels, config.search.adapters, space)
    order = [*chosen, *(k for k in range(len(finished)) if k not in chosen)][: config.search.adapters]
    stack = np.stack([log_probs[k] for k in order])
    score = gaussian_nll if space == "value" else nll
    by_size = {str(size): float(score(average(stack[:size], space), labels)) for size in range(1, len(order) + 1)}
    return {
        "adapters": [finished[k].name for k in chosen],
        "size": len(chosen),
        "validation_nll": by_size[str(len(chosen))],
        "by_size": by_size,
    }


def _cached(config: RunConfig, folder: Path, finished: Sequence[TrialRecord]) -> tuple[list[Any], Any, Any]:
    """Each trial's log-probabilities (N, C) or values (N, 1), the right answers (N,), and the space of averages."""
    cached = [read_predictions(RunPaths(folder / TRIALS / r.name).predictions, "validation") for r in finished]
    for record, predictions in zip(finished, cached, strict=True):
        if predictions.row_ids != cached[0].row_ids:
            raise RunFolderError(f"{record.name}: predictions", None, "are of other rows than the other trials'")
    if hasattr(cached[0], "token_log_probs"):
        # Completions: a token is a row with one choice, the reference; its mixture probability needs no other.
        tokens = [predictions.token_log_probs[0][:, None] for predictions in cached]
        return tokens, np.zeros(len(tokens[0]), dtype=np.int64), "probability"
    numbers = hasattr(cached[0], "values")
    label_of = {row.id: row.score if numbers else row.label for row in load_splits(config.data).validation}
    missing = [row_id for row_id in cached[0].row_ids if row_id not in label_of]
    if missing:
        raise RunFolderError("validation predictions", missing[0], "is no row of the validation split")
    labels = np.array([label_of[row_id] for row_id in cached[0].row_ids])
    if numbers:
        return [predictions.values[0][:, None] for predictions in cached], labels, "value"
    return [predictions.log_probs[0] for predictions in cached], labels, config.ensemble.average
