"""Resumable checkpoints: independent of ZeRO stage and process count, never half-written, nothing pickled.

checkpoints/step_000123/
  state.safetensors     per trained parameter: fp32 value, exp_avg, exp_avg_sq; budget/…: AdaLoRA's importance
  counters.json         step, seed, configuration hash, best validation so far
  manifest.json         sizes and hashes
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline import distributed
from pipeline.errors import RunFolderError
from pipeline.runs import manifest_faults, publish_folder, read_json, write_json

STATE, COUNTERS = "state.safetensors", "counters.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Counters:
    """Where a run stands. Masks and row order follow from the step and the seed."""

    step: int
    seed: int
    config_sha256: str
    best_step: int | None = None
    best_validation_nll: float | None = None


def collect_state(engine: Any, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """fp32 values and moments of every trained parameter, on the CPU. A collective: all processes call it."""
    state: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        state[name] = distributed.full_fp32(parameter).contiguous()
        for moment in MOMENTS:
            value = distributed.full_moment(engine, parameter, moment)
            if value is not None:
                state[f"{moment}/{name}"] = value.contiguous()
    return state


def save_checkpoint(folder: Path, state: dict[str, Tensor], counters: Counters, keep: int) -> Path:
    """Publish checkpoints/step_NNNNNN by rename, then drop all but the newest `keep`. Main process only."""
    target = folder / f"step_{counters.step:06d}"

    def fill(aside: Path) -> None:
        save_file(state, aside / STATE)
        write_json(aside / COUNTERS, asdict(counters))

    publish_folder(target, fill)
    for old in published_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


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


def load_extra(path: Path, prefix: str) -> dict[str, Tensor]:
    """What was saved as `prefix/…` beside the parameters and their moments."""
    state = load_file(path / STATE)
    return {key.removeprefix(f"{prefix}/"): value for key, value in state.items() if key.startswith(f"{prefix}/")}


def load_checkpoint(path: Path, engine: Any, trained: dict[str, nn.Parameter]) -> Counters:
    """Put a checkpoint's state into the engine; returns where it stands.

    Raises:
        RunFolderError: the checkpoint holds other parameters than the run trains.
    """
    state = load_file(path / STATE)
    held = {name for name in state if "/" not in name}
    if held != set(trained):
        odd = sorted(held ^ set(trained))[:3]
        raise RunFolderError(
            str(path),
            None,
            f"holds other parameters than this run trains ({', '.join(odd)})",
            "Use a new --run-dir, or the configuration the run was started with.",
        )
    counters = Counters(**read_json(path / COUNTERS))
    for name, parameter in trained.items():
        distributed.set_full_fp32(parameter, state[name])
    moments = {
        parameter: {moment: state[f"{moment}/{name}"] for moment in MOMENTS}
        for name, parameter in trained.items()
        if f"{MOMENTS[0]}/{name}" in state
    }
    if moments:
        distributed.restore_moments(engine, counters.step, moments)
    return counters
