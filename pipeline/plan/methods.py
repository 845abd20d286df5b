"""Which methods of a comparison the base model cannot honour: found out on its modules alone, without weights."""

from __future__ import annotations

from pathlib import Path

from pipeline.adapters.build import attach_adapter
from pipeline.config import AdapterConfig, RunConfig
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.model.kind import model_kind
from pipeline.model.load import load_skeleton
from pipeline.run_folder.comparison import REFUSALS, plan_trainings
from pipeline.run_folder.paths import RunPaths, load_saved


def check_methods(run_dir: Path, trusted: bool = False) -> None:
    """Write refused.json: method -> why the model cannot honour it; empty where all can be trained."""
    paths = RunPaths(run_dir)
    write_json(run_dir / REFUSALS, refused_methods(load_saved(paths.config, trusted)))


def refused_methods(config: RunConfig) -> dict[str, str]:
    """Attach every method to a skeleton of the base; the error of each that cannot be attached.

    Raises:
        ConfigError: the base cannot be loaded as configured, whatever the method.
    """
    classes = 2 if model_kind(config.model) == "classifier" else None  # how many does not matter here
    refused: dict[str, str] = {}
    seen: list[tuple[AdapterConfig, int, str]] = []  # with its length, on which AdaLoRA's schedule depends
    for training, own in plan_trainings(config):
        adapter, length = own.adapter, own.train.max_steps
        fault = next((said for *one, said in seen if one == [adapter, length]), None)
        if fault is None:
            fault = ""
            skeleton = load_skeleton(own.model, classes)  # a new one each time: attaching changes it
            try:
                attach_adapter(adapter, skeleton, length, own.train.seed)
            except UserError as error:
                fault = str(error)
            seen.append((adapter, length, fault))
        if fault:
            refused[training.method] = fault
    return refused
