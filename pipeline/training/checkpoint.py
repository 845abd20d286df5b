"""Resumable checkpoints: independent of ZeRO stage and process count, never half-written, nothing pickled.

checkpoints/step_000123/
  state.safetensors     per trained parameter: fp32 value, exp_avg, exp_avg_sq (or what `pipeline.model.adamw` says of
                        bitsandbytes); budget/…: AdaLoRA's importance
  counters.json         step, seed, hashes of configuration and data, best validation so far
  manifest.json         sizes and hashes
checkpoints/latest.json, best.json
                        for people and tools: which checkpoint, its step, its validation NLL, the hash of its state.
                        A resume reads the folders themselves, so a pointer that a crash left behind misleads nobody.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import RunFolderError
from pipeline.files import (
    MANIFEST,
    manifest_faults,
    publish_folder,
    read_json,
    remove_asides,
    remove_folder,
    write_json,
)
from pipeline.model.adamw import MOMENTS
from pipeline.run_folder.paths import step_name
from pipeline.training.engine import Slot

STATE, COUNTERS = "state.safetensors", "counters.json"
_SLACK_BYTES = 1 << 16
"""Headers, counters and manifest of a checkpoint."""
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Counters:
    """Where a run stands. Masks and row order follow from the step and the seed."""

    step: int
    seed: int
    config_sha256: str
    """`RunConfig.training_sha256`."""
    data_sha256: str
    """`Splits.fingerprint`."""
    best_step: int | None = None
    best_validation_nll: float | None = None
    validated_step: int | None = None
    """The last step after which a validation ended; a stop can come before that of `step`."""
    lowest_step: int | None = None
    """Whose validation NLL is the lowest so far: `best_step`, where the best adapter is the one that is kept."""
    lowest_validation_nll: float | None = None

    def validated(self, step: int, nll: float, afresh: bool = False) -> Counters:
        """After a validation; the same again where it is made up for.

        Args:
            afresh: whether those before do not count.
        """
        lowest = None if afresh else self.lowest_validation_nll
        if lowest is None or nll < lowest:
            return replace(self, validated_step=step, lowest_step=step, lowest_validation_nll=nll)
        return replace(self, validated_step=step)

    def waited(self, every: int) -> int:
        """Validations in a row, one in `every` steps, that were no improvement."""
        return (self.validated_step - self.lowest_step) // every if self.validated_step and self.lowest_step else 0


def collect_state(slot: Slot, keep: bool) -> dict[str, Tensor]:
    """fp32 values and moments of every trained parameter, on the CPU; empty where not `keep`.

    Parameter by parameter, nothing frozen among them. A collective: all processes call it.
    """
    state: dict[str, Tensor] = {}
    for name in slot.sizes:
        value = slot.value(name)
        if keep:
            state[name] = value.contiguous()
        for moment in slot.moments:
            found = slot.moment(name, moment)
            if keep and found is not None:
                state[f"{moment}/{name}"] = found.contiguous()
    return state


def checkpoint_bytes(trained: dict[str, nn.Parameter]) -> int:
    """Size of a checkpoint's state at the most: value and two moments of every trained parameter in fp32."""
    numbers = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained.values())
    return 4 * (1 + len(MOMENTS)) * numbers


def save_checkpoint(
    folder: Path, state: dict[str, Tensor], counters: Counters, keep: int, budget: int | None = None
) -> Path:
    """Publish checkpoints/step_NNNNNN by rename, move the pointers, drop what retention does not keep.

    Main process only.

    Args:
        keep: newest checkpoints that stay, beside the best.
        budget: bytes that all together may take.

    Raises:
        DiskFull: nothing is published; every earlier checkpoint stands.
    """
    target = folder / step_name(counters.step)

    def fill(aside: Path) -> None:
        save_file(state, aside / STATE)
        write_json(aside / COUNTERS, asdict(counters))

    needed = sum(value.numel() * value.element_size() for value in state.values()) + _SLACK_BYTES
    publish_folder(target, fill, needed)
    point(folder, counters)
    prune(folder, keep, budget, counters.best_step)
    return target


def point(folder: Path, counters: Counters) -> None:
    """Let latest.json name the checkpoint of `counters`, and best.json that of the best validation, if it is there."""
    pointed = {"latest": counters.step, "best": counters.best_step}
    for name, step in pointed.items():
        target = folder / step_name(step or 0)
        if step is None or not target.is_dir():
            continue
        entry = {
            "name": target.name,
            "step": step,
            "validation_nll": counters.best_validation_nll if step == counters.best_step else None,
            "sha256": read_json(target / MANIFEST)["files"][STATE]["sha256"],
        }
        write_json(folder / f"{name}.json", entry)


def prune(folder: Path, keep: int, budget: int | None, best_step: int | None) -> None:
    """Drop all but the newest `keep` and the best; then the oldest of those while they take more than `budget` bytes.

    The newest and the best always stay. Half-written and damaged folders do not count.
    """
    published = published_checkpoints(folder)
    removable = [path for path in published[:-1] if best_step is None or path.name != step_name(best_step)]
    for old in [path for path in removable if path not in published[-keep:]]:
        remove_folder(old)
        removable.remove(old)
        published.remove(old)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in published}
    while budget is not None and removable and sum(sizes.values()) > budget:
        sizes.pop(removable[0])
        remove_folder(removable.pop(0))


def published_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoint folders, oldest first. Half-written ones never have such a name."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _STEP_FOLDER.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint and what is wrong with newer ones."""
    faults: list[str] = []
    for candidate in reversed(published_checkpoints(folder)):
        found = manifest_faults(candidate)
        if not found:
            return candidate, faults
        faults.append(f"{candidate.name} is damaged ({'; '.join(found)}): using the one before it")
    return None, faults


def tidy(folder: Path, found: Path | None) -> None:
    """Once no other process writes here: remove what killed saves left, put damaged checkpoints out of the way.

    Args:
        found: the newest whole checkpoint; newer ones become damaged_step_NNNNNN.
    """
    remove_asides(folder, rf"{_STEP_FOLDER.pattern}|latest\.json|best\.json")
    for path in published_checkpoints(folder):
        if found is None or path.name > found.name:
            shutil.rmtree(folder / f"damaged_{path.name}", ignore_errors=True)
            path.rename(folder / f"damaged_{path.name}")


def load_extra(path: Path, prefix: str) -> dict[str, Tensor]:
    """What was saved as `prefix/…` beside the parameters and their moments."""
    state = load_file(path / STATE)
    return {key.removeprefix(f"{prefix}/"): value for key, value in state.items() if key.startswith(f"{prefix}/")}


def load_checkpoint(path: Path, slot: Slot) -> Counters:
    """Put a checkpoint's state into the engine; returns where it stands.

    Raises:
        RunFolderError: the checkpoint holds other parameters than the run trains.
    """
    state = load_file(path / STATE)
    held = {name for name in state if "/" not in name}
    if held != set(slot.sizes):
        odd = sorted(held ^ set(slot.sizes))[:3]
        raise RunFolderError(
            str(path),
            None,
            f"holds other parameters than this run trains ({', '.join(odd)})",
            "Use a new --run-dir, or the configuration the run was started with.",
        )
    counters = Counters(**read_json(path / COUNTERS))
    moments = {
        name: {moment: state[key] for moment in slot.moments if (key := f"{moment}/{name}") in state}
        for name in slot.sizes
        if f"{slot.moments[0]}/{name}" in state
    }
    slot.restore(counters.step, state, moments)
    return counters
