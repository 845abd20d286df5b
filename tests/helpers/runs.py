"""Trainings in processes of their own, and what their folders say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.config import dump_config, load_config
from pipeline.distributed.launcher import launcher_command, launcher_environment, run_stage
from pipeline.files import ADAPTER_WEIGHTS, read_json_lines, sha256_file, write_text
from pipeline.run_folder.chain import Origin, predictions_from
from pipeline.run_folder.mark import claim
from pipeline.run_folder.members import read_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import Predictions, write_predictions


def launch(folder: Path, settings: list[str]) -> int:
    """Train in processes of their own, through the DeepSpeed launcher."""
    config = load_config(None, settings)
    claim(folder, "run")
    write_text(RunPaths(folder).config, dump_config(config))
    return run_stage(
        launcher_command(["pipeline.stages", "train"], folder, config.launch),
        folder / "logs" / "train.log",
        folder,
        "train",
        launcher_environment(config.launch),
        in_world=True,
    )


def write_predicted(folder: Path, split: str, predictions: Predictions, data_sha256: str = "rows") -> None:
    """predictions/SPLIT.npz as evaluate leaves it, made from the folder's own config.yaml and members.json."""
    paths = RunPaths(folder)
    origin = Origin(load_config(paths.config).training_sha256(), data_sha256)
    made_from = predictions_from(origin, read_members(paths.predictions))
    write_predictions(paths.predictions, split, replace(predictions, made_from=made_from))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(RunPaths(folder).metrics) if row["kind"] == "train"]


def gradient_norms(folder: Path) -> list[float]:
    return [row["gradient_norm"] for row in read_json_lines(RunPaths(folder).metrics) if row["kind"] == "train"]


def first_moments(folder: Path) -> torch.Tensor:
    """Adam's exp_avg of all parameters: linear in the gradients, so a wrong scale shows, as it does not in losses."""
    state = load_file(folder / "checkpoints" / "step_000006" / "state.safetensors")
    return torch.cat([value.flatten() for name, value in sorted(state.items()) if name.startswith("exp_avg/")])


def adapter_hash(folder: Path) -> str:
    return sha256_file(folder / "adapter" / ADAPTER_WEIGHTS)
