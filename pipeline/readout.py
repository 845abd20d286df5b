"""Predictions of rows under members, shared among processes, and their validation scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline import distributed
from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import Member
from pipeline.data.rows import Row
from pipeline.distributed import World
from pipeline.predictions import ChoicePredictions, CompletionPredictions, Predictions
from pipeline.reader import OnChunk, Reader
from pipeline.scores import accuracy, nll


def predict_shared(
    reader: Reader, adapters: Adapters, rows: Sequence[Row], members: Sequence[Member], world: World,
    on_chunk: OnChunk | None = None,
) -> Predictions:
    """Log-probabilities of every answer of `rows` under every member.

    Rows are divided among all processes; every process returns the whole.
    """
    own = rows[world.process_rank :: world.world_size]
    mine = reader.predict(adapters, own, members, on_chunk) if own else None
    parts = [part for part in distributed.gather_objects(mine) if part is not None]
    return merge_predictions(parts, [row.id for row in rows])


def merge_predictions(parts: Sequence[Predictions], row_ids: Sequence[str]) -> Predictions:
    """One set of predictions in the order of `row_ids` from parts that cover it."""
    place = {name: (part, i) for part in parts for i, name in enumerate(part.row_ids)}
    where = [place[name] for name in row_ids]
    if isinstance(parts[0], ChoicePredictions):
        width = max(part.log_probs.shape[-1] for part in parts)  # type: ignore[union-attr]
        table = np.full((parts[0].log_probs.shape[0], len(where), width), -np.inf, dtype=np.float32)
        for n, (part, i) in enumerate(where):
            values = part.log_probs[:, i]  # type: ignore[union-attr]
            table[:, n, : values.shape[-1]] = values
        return ChoicePredictions(tuple(row_ids), table)
    pieces = [part.token_log_probs[:, part.offsets[i] : part.offsets[i + 1]] for part, i in where]  # type: ignore[union-attr]
    offsets = np.concatenate([[0], np.cumsum([piece.shape[1] for piece in pieces])]).astype(np.int64)
    return CompletionPredictions(tuple(row_ids), np.concatenate(pieces, axis=1), offsets)


def validation_scores(predictions: Predictions, rows: Sequence[Row]) -> dict[str, float]:
    """NLL in nats (per row for choices, per token for completions) and, for choices, accuracy of member 0."""
    if isinstance(predictions, CompletionPredictions):
        return {"nll": float(-predictions.token_log_probs[0].mean())}
    labels = np.array([row.label for row in rows])
    log_probs = predictions.log_probs[0].astype(np.float64)
    return {"nll": float(nll(log_probs, labels)), "accuracy": float(accuracy(log_probs, labels))}
