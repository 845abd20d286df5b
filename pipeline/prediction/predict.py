"""Predictions of rows under members, shared among processes, and their validation scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import Member
from pipeline.data.rows import Row
from pipeline.distributed import zero
from pipeline.distributed.world import World, agree, gather_objects
from pipeline.errors import Stopped
from pipeline.prediction.task import OnChunk, Task
from pipeline.run_folder.labelled import join_labels
from pipeline.run_folder.predictions import Predictions
from pipeline.scores.validation import VALIDATION_SCORES


def predict_shared(
    task: Task, adapters: Adapters, rows: Sequence[Row], members: Sequence[Member], world: World,
    on_chunk: OnChunk | None = None, stop_asked: Callable[[], bool] = lambda: False,
) -> Predictions:
    """What every member says about `rows`: log-probabilities of their answers, or numbers.

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
    return type(parts[0]).merged(parts, [row.id for row in rows])


def validation_scores(predictions: Predictions, rows: Sequence[Row]) -> dict[str, float]:
    """Scores of member 0 (see `pipeline.scores.validation`). `nll`, in nats, is what selection goes by in every kind.

    Raises:
        RunFolderError: the predictions are of other rows, or lack a right answer.
    """
    split = join_labels(predictions, rows, "validation predictions")
    return VALIDATION_SCORES[predictions.kind](split.outputs[0], split.labels)
