"""The configuration in force: recipe, quick recipe, overrides; batches and steps that fit the machine and the data."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from pipeline.config import LaunchConfig, RunConfig, TrainConfig, build_config
from pipeline.config.load import find_recipe, merge_trees, overridden_tree, read_yaml, with_values
from pipeline.data.splits import load_splits
from pipeline.distributed.launcher import world_processes
from pipeline.errors import ConfigError, RunFolderError
from pipeline.plan.request import Request
from pipeline.run_folder.mark import is_marked
from pipeline.run_folder.paths import RunPaths, read_saved, without_trust
from pipeline.terminal import say


def fit_micro_batch(train: TrainConfig, launch: LaunchConfig) -> TrainConfig:
    """`train` with the largest micro-batch, up to train.micro_batch, that divides a process's share of a step.

    Raises:
        ConfigError: the global batch cannot be shared out evenly.
    """
    processes = world_processes(launch)
    if processes is None:
        return train
    if train.global_batch % processes:
        fitting = -(-train.global_batch // processes) * processes
        raise ConfigError(
            "train.global_batch", train.global_batch, f"must be a multiple of the {processes} processes",
            f"Set train.global_batch={fitting}, or launch.processes.",
        )
    fitting = math.gcd(train.global_batch // processes, train.micro_batch)
    if fitting == train.micro_batch:
        return train
    print(f"train.micro_batch {train.micro_batch} -> {fitting}: what a process has of a step", file=sys.stderr)
    return train.model_copy(update={"micro_batch": fitting})


def resolve_new(
    request: Request, stage: str, recipe: str = "default", unread: Mapping[str, str] | None = None
) -> RunConfig:
    """The configuration of something that is started: recipe, quick recipe, overrides.

    Args:
        stage: who reads it, for errors.
        recipe: where the request names none.
        unread: beginning of an override that the stage does not read -> the way out.

    Raises:
        ConfigError: anything wrong with keys or values.
    """
    found = find_recipe(request.source or recipe)
    base = without_trust(read_yaml(found)) if is_marked(found.parent) else read_yaml(found)
    if request.source is None and any(word.startswith(("data.path=", "data.sources=")) for word in request.overrides):
        base = {name: part for name, part in base.items() if name not in ("data", "label")}  # sizes of its own rows
    for word in request.overrides:
        for beginning, remedy in (unread or {}).items():
            if word.startswith(beginning):
                raise ConfigError(word, None, f"is not read by {stage}: each method has its own", remedy)
    return _on_top(base, request)


def resolve_saved(request: Request, stage: str) -> RunConfig:
    """The configuration in the run folder, of which a later stage may change `launch` and what is trusted alone.

    Raises:
        ConfigError: an override of something else.
        RunFolderError: the folder holds no run, or one of another layout.
    """
    saved = RunPaths(request.run).config
    if not saved.exists():
        raise RunFolderError(str(saved), None, "does not exist", "Train first, or give the folder of a run.")
    for word in request.overrides:
        if not word.startswith(("launch.", "model.trust_remote_code=")):
            remedy = f"Change it in {os.path.relpath(saved)}, or give the key to train."
            raise ConfigError(word, None, f"is not read by {stage}, which takes the run's config.yaml", remedy)
    tree = read_saved(saved)
    config = _on_top(without_trust(tree), request)
    hosts = (tree.get("launch") or {}).get("hostfile")
    if hosts and config.launch.hostfile is None:
        say(f"launch.hostfile={hosts} is not taken from a run folder: {stage} works on this machine unless you give it")
    return config


def _on_top(base: dict[str, Any], request: Request) -> RunConfig:
    if request.quick:
        base = merge_trees(base, read_yaml(find_recipe("quick")))
    return build_config(overridden_tree(base, request.overrides))


def resolve_epochs(config: RunConfig) -> RunConfig:
    """`config` with max_steps = ceil(epochs × training rows / global_batch) and without epochs; as it is without them.

    Raises:
        DataError: the rows cannot be read.
    """
    if config.train.epochs is None:
        return config
    steps = math.ceil(config.train.epochs * len(load_splits(config.data).train) / config.train.global_batch)
    return with_values(config, {"train.epochs": None, "train.max_steps": max(1, steps)})


def length_text(train: TrainConfig) -> str:
    """For people: how long training is."""
    if train.epochs is None:
        return f"{train.max_steps} steps"
    return f"{train.epochs:g} epochs (counted in steps when the rows are read)"
