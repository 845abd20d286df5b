"""Predictions of rows under members, shared among processes, and their validation scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import Member
from pipeline.data.rows import Row
from pipeline.distributed import zero
from pipeline.distributed.world import World, agree, gather_objects
from pipeline.errors import Stopped
from pipeline.prediction.task import OnChunk, Task
from pipeline.run_folder.predictions import ChoicePredictions, CompletionPredictions, Predictions, RegressionPredictions
from pipeline.scores.classification import accuracy, nll
from pipeline.scores.regression import Correlation, gaussian_nll, row_squared_error


def predict_shared(
    task: Task, adapters: Adapters, rows: Sequence[Row], members: Sequence[Member], world: World,
    on_chunk: OnChunk | None = None, stop_asked: Callable[[], bool] = lambda: False,
) -> Predictions:
    """Log-probabilities of every answer of `rows` under every member.

    Rows are divided among all processes; every process returns the whole.

    Raises:
        Stopped: on every process, where `stop_asked` says so on any of them before its last chunk.
    """

    own, sharded = rows[world.process_rank :: world.world_size], zero.is_sharded(adapters.model)

    def after_chunk(done: int, total: int) -> None:
        if on_chunk is not None and own:
            on_chunk(done, total)
        # In a sharded model's passes all processes are in step, and can only leave together.
        if agree(stop_asked(), world.device) if sharded else done < total and stop_asked():
            raise Stopped("stopped between two chunks of a prediction")

    mine, stopped = None, False
    try:
        if own:
            mine = task.predict(adapters, own, members, after_chunk)
        elif sharded:
            task.predict(adapters, rows[:1], members, after_chunk)  # every pass needs every process
    except Stopped:
        stopped = True
    shared = gather_objects((mine, stopped))  # who is stopped meets the others here: none waits in vain
    if any(stopped for _, stopped in shared):
        raise Stopped("stopped between two chunks of a prediction")
    parts = [part for part, _ in shared if part is not None]
    return merge_predictions(parts, [row.id for row in rows])


def merge_predictions(parts: Sequence[Predictions], row_ids: Sequence[str]) -> Predictions:
    """One set of predictions in the order of `row_ids` from parts of one kind that cover it."""
    numbers = [part for part in parts if isinstance(part, RegressionPredictions)]
    if numbers:
        return _merge_values(numbers, row_ids)
    choices = [part for part in parts if isinstance(part, ChoicePredictions)]
    if choices:
        return _merge_choices(choices, row_ids)
    return _merge_completions([part for part in parts if isinstance(part, CompletionPredictions)], row_ids)


def _merge_choices(parts: Sequence[ChoicePredictions], row_ids: Sequence[str]) -> ChoicePredictions:
    width = max(part.log_probs.shape[-1] for part in parts)
    table = np.full((parts[0].members, len(row_ids), width), -np.inf, dtype=np.float32)
    place = {name: n for n, name in enumerate(row_ids)}
    for part in parts:
        where = [place[name] for name in part.row_ids]
        table[:, where, : part.log_probs.shape[-1]] = part.log_probs
    return ChoicePredictions(tuple(row_ids), table)


def _merge_values(parts: Sequence[RegressionPredictions], row_ids: Sequence[str]) -> RegressionPredictions:
    of_row = {name: part.values[:, n] for part in parts for n, name in enumerate(part.row_ids)}
    return RegressionPredictions(tuple(row_ids), np.stack([of_row[name] for name in row_ids], axis=1))


def _merge_completions(parts: Sequence[CompletionPredictions], row_ids: Sequence[str]) -> CompletionPredictions:
    pieces = {}
    for part in parts:
        for name, piece in zip(part.row_ids, np.split(part.token_log_probs, part.offsets[1:-1], axis=1), strict=True):
            pieces[name] = piece
    ordered = [pieces[name] for name in row_ids]
    offsets = np.concatenate([[0], np.cumsum([piece.shape[1] for piece in ordered])]).astype(np.int64)
    return CompletionPredictions(tuple(row_ids), np.concatenate(ordered, axis=1), offsets)


def validation_scores(predictions: Predictions, rows: Sequence[Row]) -> dict[str, float]:
    """Scores of member 0. `nll`, in nats, is what selection goes by in every kind of rows.

    Choices: NLL per row, accuracy. Completions: NLL per token. Regression: the NLL per row of a Gaussian with the
    best variance (it orders as the mean squared error does), root mean squared error, Pearson's correlation.
    """
    if isinstance(predictions, RegressionPredictions):
        values, right = predictions.values[0][:, None], np.array([row.score for row in rows], dtype=np.float64)
        rmse = float(row_squared_error(values, right).mean() ** 0.5)
        pearson = Correlation(values.T, right, "pearson").point()
        return {"nll": float(gaussian_nll(values, right)), "rmse": rmse, "pearson": pearson}
    if isinstance(predictions, CompletionPredictions):
        return {"nll": float(-predictions.token_log_probs[0].mean())}
    labels = np.array([row.label for row in rows])
    log_probs = predictions.log_probs[0].astype(np.float64)
    return {"nll": float(nll(log_probs, labels)), "accuracy": float(accuracy(log_probs, labels))}
