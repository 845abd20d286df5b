"""adapter/ of a run: published with the validation predictions that go with it, and found again after a crash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.adapters.attach import Adapters
from pipeline.adapters.heads import head_state
from pipeline.adapters.peft_format import adapter_matrices, write_adapter
from pipeline.config import EvaluationDataConfig
from pipeline.distributed.world import World, gather_objects
from pipeline.errors import DiskFull
from pipeline.files import (
    ADAPTER_WEIGHTS,
    MANIFEST,
    manifest_faults,
    publish_folder,
    read_json,
    sha256_file,
    write_json,
)
from pipeline.run_folder.chain import Origin, own_member, predictions_from
from pipeline.run_folder.members import write_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import Predictions, write_predictions
from pipeline.training.engine import Slot


@dataclass(frozen=True)
class Validation:
    """What the validation split says about the adapter of a step."""

    step: int
    scores: dict[str, float]
    """`nll`, in nats, is what selection goes by."""
    predictions: Predictions


def publish_adapter(
    adapters: Adapters, slot: Slot, base: str, origin: Origin, found: Validation, paths: RunPaths, world: World,
    evaluation: EvaluationDataConfig | None,
) -> None:
    """adapter/ in PEFT format as it stands in the engine now, and the validation predictions that go with it.

    A collective. Raises `DiskFull`.

    Args:
        base: name or path of the base model.
        origin: of the run.
        evaluation: `data.evaluation`.
    """
    matrices = adapter_matrices(adapters.layers, slot.adapter, slot.whole)  # a collective
    head = head_state(adapters.heads, slot.adapter, slot.whole)  # another one
    spec = adapters.specs[slot.adapter]

    def fill(folder: Path) -> None:
        write_adapter(folder, matrices, spec, adapters.layer_count, base, adapters.suffixes, head)
        entry = {"step": found.step, "validation_nll": found.scores["nll"], "origin": origin.as_dict()}
        source = None if evaluation is None else evaluation.model_dump(mode="json")
        write_json(folder / MANIFEST, entry | {"evaluation": source})

    def publish() -> None:
        (paths.predictions / "validation.npz").unlink(missing_ok=True)  # of the adapter before
        publish_folder(paths.adapter, fill)
        sha256 = sha256_file(paths.adapter / ADAPTER_WEIGHTS)
        members = [own_member(paths.adapter, sha256)]
        write_members(paths.predictions, members)
        predictions = replace(found.predictions, made_from=predictions_from(origin, members))
        write_predictions(paths.predictions, "validation", predictions)

    main_writes(world, publish)


def published_step(paths: RunPaths) -> int | None:
    """The step of the adapter in adapter/, as the main process sees it; None where none is whole with its predictions.

    A collective.
    """
    whole = not manifest_faults(paths.adapter) and (paths.predictions / "validation.npz").exists()
    step: int | None = read_json(paths.adapter / MANIFEST).get("step") if whole else None
    return gather_objects(step)[0]


def main_writes(world: World, work: Callable[[], None]) -> None:
    """Let the main process write while all wait; a full disk stops all of them alike. Raises `DiskFull`."""
    said = None
    if world.is_main:
        try:
            work()
        except DiskFull as error:
            said = str(error)
    if said := gather_objects(said)[0]:
        raise DiskFull(said)
