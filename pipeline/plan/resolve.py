"""The configuration in force: recipe, quick recipe, overrides; batches and steps that fit the machine and the data."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.config import LaunchConfig, RunConfig, TrainConfig
from pipeline.config.data import EMBEDDED_DATA
from pipeline.config.load import find_recipe, overridden_tree, read_yaml, recipe_files, with_values
from pipeline.config.search import NamedMethod
from pipeline.data.splits import load_splits
from pipeline.distributed.launcher import world_processes
from pipeline.errors import ConfigError, RunFolderError
from pipeline.plan.layers import Layers
from pipeline.plan.request import Request
from pipeline.run_folder.mark import is_marked
from pipeline.run_folder.paths import RunPaths, read_saved, without_trust
from pipeline.terminal import say

ALWAYS = ("launch.", "model.trust_remote_code=")
"""Beginnings of the overrides that a stage of a run folder takes for itself: they are not written there."""
_READ = ("evaluate.", "select.", "ensemble.average=", "ensemble.adaptive=", "data.choice_score=", "label=")
TAKEN: dict[str, tuple[str, ...]] = {
    "evaluate": ("ensemble.", "data.evaluation", *_READ),
    "report": _READ,
    "export": ("export.",),
}
"""Stage -> beginnings of the overrides of what may change after training; config.yaml then says them, too."""
OF_THE_DATA = (
    "data", "label", "search", "train.max_steps", "train.epochs", "train.validate_every_steps",
    "train.checkpoint_every_steps",
)
"""What of a recipe fits its data alone: which and how many rows, how long to train and to search on them."""
OWN_DATA = "default for own data"
"""Where values are from that the rows of the user have in the place of these."""
OWN_EPOCHS = 3.0
MOST_VALIDATIONS = 20


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
    """The configuration of `new_layers`."""
    return new_layers(request, stage, recipe, unread).config


def resolve_saved(request: Request, stage: str) -> RunConfig:
    """The configuration of `saved_layers`."""
    return saved_layers(request, stage).config


def new_layers(
    request: Request, stage: str, recipe: str = "default", unread: Mapping[str, str] | None = None
) -> Layers:
    """The settings of something that is started: recipe, file, quick recipe, overrides.

    A file stands on top of the same recipe that is taken without one. Of a recipe for embedded data, what is of those
    data (`OF_THE_DATA`) is not taken with others, which make `OWN_EPOCHS` epochs.

    Args:
        stage: who reads it, for errors.
        recipe: where the request names none.
        unread: beginning of an override that the stage does not read -> the way out.

    Raises:
        ConfigError: anything wrong with keys or values.
    """
    for word in request.overrides:
        for beginning, remedy in (unread or {}).items():
            if word.startswith(beginning):
                raise ConfigError(word, None, f"is not read by {stage}: each method has its own", remedy)
    found = find_recipe(request.source or recipe)
    own_file = found.resolve() not in recipe_files().values()
    below, above = read_yaml(find_recipe(recipe) if own_file else found), read_yaml(found) if own_file else {}
    if own_file and is_marked(found.parent):
        above = without_trust(above)
    own_rows = _rows_of(overridden_tree(above, request.overrides), EMBEDDED_DATA) != EMBEDDED_DATA
    name = f"recipe {recipe if own_file or not request.source else request.source}"
    if own_rows and _rows_of(below) == EMBEDDED_DATA:
        layers = Layers().with_tree(name, _without(below, OF_THE_DATA))
        layers = layers.with_tree(OWN_DATA, {"train": {"epochs": OWN_EPOCHS}})
    else:
        layers = Layers().with_tree(name, below)
    return _on_top(layers.with_tree(str(request.source), above), request)


def saved_layers(request: Request, stage: str) -> Layers:
    """The settings in the run folder, with what the stage may change of them: how the trained adapters are read.

    Raises:
        ConfigError: an override of something else.
        RunFolderError: the folder holds no run, or one of another layout.
    """
    paths = RunPaths(request.run)
    saved = paths.config
    if not saved.exists():
        raise RunFolderError(str(saved), None, "does not exist", "Train first, or give the folder of a run.")
    taken = tuple(key for key in TAKEN.get(stage, ()) if not (key == "data.evaluation" and paths.comparison.exists()))
    for word in request.overrides:
        if word.startswith((*ALWAYS, *taken)):
            continue
        key = word.partition("=")[0]
        owner = next((name for name, keys in TAKEN.items() if word.startswith(keys)), None)
        if owner is None or paths.comparison.exists():
            remedy = "It decides what is trained, so it wants a training of its own: train in another --run-dir."
        else:
            remedy = f"Give it to {owner}: loradrop {owner} --run-dir {os.path.relpath(request.run)} {key}=…"
        raise ConfigError(word, None, f"is not read by {stage}, which takes the run's config.yaml", remedy)
    tree = read_saved(saved)
    layers = _on_top(Layers().with_tree("run folder", without_trust(tree)), request)
    hosts = (tree.get("launch") or {}).get("hostfile")
    if hosts and layers.config.launch.hostfile is None:
        say(f"launch.hostfile={hosts} is not taken from a run folder: {stage} works on this machine unless you give it")
    return layers


def _on_top(layers: Layers, request: Request) -> Layers:
    if request.quick:
        layers = layers.with_tree("--quick", read_yaml(find_recipe("quick")))
    return layers.with_overrides(request.overrides)


def _rows_of(tree: Mapping[str, Any], default: str = "") -> object:
    """What of the section `data` says where rows come from."""
    data = tree.get("data")
    return data.get("sources") or data.get("path", default) if isinstance(data, Mapping) else default


def _without(tree: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """`tree` without sections and keys of sections."""
    return {
        name: {key: value for key, value in part.items() if f"{name}.{key}" not in keys}
        if isinstance(part, Mapping) else part
        for name, part in tree.items() if name not in keys
    }  # fmt: skip


def resolve_epochs(config: RunConfig) -> RunConfig:
    """`config` with max_steps = ceil(epochs × training rows / global_batch) and without epochs; as it is without them.
    Where nothing says how often to validate, a long training does so `MOST_VALIDATIONS` times. The same of the methods
    of a comparison that have epochs of their own.

    Raises:
        DataError: the rows cannot be read.
    """
    train, own = config.train, [_own_epochs(method) for method in config.compare.methods]
    if train.epochs is None and not any(own):
        return config
    rows, values = len(load_splits(config.data).train), dict[str, Any]()
    if train.epochs is not None:
        steps = _steps(train.epochs, rows, train.global_batch)
        values = {"train.epochs": None, "train.max_steps": steps}
        if "validate_every_steps" not in train.model_fields_set:
            values["train.validate_every_steps"] = max(train.validate_every_steps, -(-steps // MOST_VALIDATIONS))
    if any(own):
        methods = config.model_dump(mode="json")["compare"]["methods"]
        for method, epochs in zip(methods, own, strict=True):
            if epochs is not None:
                del method["train"]["epochs"]
                batch = method["train"].get("global_batch")
                batch = batch if type(batch) is int and batch > 0 else train.global_batch  # else refused when planned
                method["train"]["max_steps"] = _steps(epochs, rows, batch)
        values["compare.methods"] = methods
    return with_values(config, values)


def _own_epochs(method: str | NamedMethod) -> float | None:
    """Epochs that a method of a comparison has of its own. None where they are no such number, or stand beside
    max_steps: that is refused when its training is planned."""
    epochs: Any = None if isinstance(method, str) or "max_steps" in method.train else method.train.get("epochs")
    usable = isinstance(epochs, int | float) and not isinstance(epochs, bool) and 0 < epochs <= 1e6
    return float(epochs) if usable else None


def _steps(epochs: float, rows: int, batch: int) -> int:
    return max(1, math.ceil(epochs * rows / batch))


def length_text(train: TrainConfig) -> str:
    """For people: how long training is."""
    length = f"{train.max_steps} steps"
    if train.epochs is not None:
        length = f"{train.epochs:g} epochs (counted in steps when the rows are read)"
    if train.patience is None:
        return length
    return f"{length}, fewer after {train.patience} validations without improvement"
