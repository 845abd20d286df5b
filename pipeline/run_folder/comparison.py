"""A comparison of methods as plain records: what is trained, what became of it, which settings validation chooses.

    runs/NAME-compare/
      config.yaml  compare.json     what was asked for; every training by name, hash and outcome
      refused.json                  methods that the base model cannot honour
      trainings/METHOD-lr…/         one run folder each
      predictions/                  of all adapters, from one pass over the base
      result.json  report.html
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from pipeline.config import RunConfig
from pipeline.config.adapter import UNSET_RATES
from pipeline.config.load import config_keys, with_values
from pipeline.config.method import takes_rescale
from pipeline.config.names.hints import meant
from pipeline.config.search import LEARNING_RATE, CompareConfig, NamedMethod
from pipeline.config.space import TERM_WEIGHT
from pipeline.errors import ConfigError, RunFolderError, UserError
from pipeline.files import ADAPTER_WEIGHTS, MANIFEST, read_json, sha256_file, write_json
from pipeline.run_folder.labelled import join_labels
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import read_predictions
from pipeline.scores.selection import SelectBy

TRAININGS = "trainings"
REFUSALS = "refused.json"
"""method -> why the base model cannot honour it."""
REFERENCE = "none"
"""The method that the others are compared with: plain LoRA."""
_SHORT = {LEARNING_RATE: "lr", TERM_WEIGHT: "lambda"}


@dataclass(frozen=True)
class Training:
    """One training of a comparison, and what became of it."""

    name: str
    """Its folder in `trainings/`."""
    method: str
    values: dict[str, Any]
    """Dotted key -> value of what is varied within the method, the seed apart."""
    seed: int
    config_sha256: str
    state: str = "waiting"
    """waiting; done; failed: its process ended with an error; refused: the method does not fit the model."""
    error: str = ""
    adapter_sha256: str | None = None
    validation_nll: float | None = None
    """Of the published adapter, nats."""
    validation_loss: float | None = None
    """What `select.by` makes of its validation predictions; less is better."""
    steps: int = 0
    seconds: float = 0.0
    """In optimizer steps: validation, checkpoints and loading apart."""
    step_seconds: float = 0.0
    """Median of a step."""
    chosen: bool = False
    """Whether validation chose these values for the method."""
    packed: bool = False
    """Whether it shared its passes with others: its seconds are then those of all of them."""

    @property
    def run(self) -> str:
        """Its folder, relative to the comparison's."""
        return f"{TRAININGS}/{self.name}"


def plan_trainings(config: RunConfig) -> list[tuple[Training, RunConfig]]:
    """Every training that `config.compare` asks for, method by method. The run's own method and rates play no part.

    Raises:
        ConfigError: an unknown method or key, an illegal value, or two trainings of one name.
    """
    compare = config.compare
    for key in compare.vary:
        _check_key("compare.vary", key, varies=True)
    seeds = compare.seeds or (config.train.seed,)
    asked = [(method, values) for method in compare.methods for values in _combinations(compare, method)]
    planned: dict[str, tuple[Training, RunConfig]] = {}
    for (method, values), seed in itertools.product(asked, seeds):
        name = _method_name(method)
        folder = _folder_name(name, values, seed if len(seeds) > 1 else None)
        if folder in planned:
            raise ConfigError("compare.methods", name, "is listed twice", "Give it another name.")
        label = f"{config.label}: {name}" if config.label else name
        try:  # names nothing of the comparison, so that a longer one can keep it
            changed = {**_adapter_values(method), **_train_values(method), **values, "train.seed": seed, "label": label}
            own = with_values(shared_part(config), changed)
        except UserError as error:
            raise ConfigError(f"compare.methods: {name}, {values_text(values)}", None, str(error)) from error
        planned[folder] = (Training(folder, name, values, seed, own.training_sha256()), own)
    return list(planned.values())


def choose(trainings: Sequence[Training]) -> list[Training]:
    """The same trainings; `chosen` marks, per method, the values with the lowest mean validation loss over seeds.

    Values of which a seed is missing count only where no others have all theirs.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for one in trainings:
        if one.state == "done" and one.validation_loss is not None:
            scores.setdefault(one.method, {}).setdefault(str(one.values), []).append(one.validation_loss)
    best = {
        method: min(by_values, key=lambda values: (-len(by_values[values]), mean(by_values[values])))
        for method, by_values in scores.items()
    }
    return [replace(one, chosen=one.state == "done" and best[one.method] == str(one.values)) for one in trainings]


def outcome(training: Training, folder: Path) -> Training:
    """`training` with what its finished run folder says. Raises `RunFolderError` where that is nothing."""
    paths = RunPaths(folder / training.run)
    rows = read_metrics(paths.metrics, train=["seconds"])
    seconds = [row["seconds"] for row in rows if row["kind"] == "train"]
    if not seconds:
        raise RunFolderError(str(paths.metrics), None, "has no training step", "Restore it, or train again.")
    return replace(
        training,
        state="done",
        error="",
        adapter_sha256=sha256_file(paths.adapter / ADAPTER_WEIGHTS),
        validation_nll=read_json(paths.adapter / MANIFEST)["validation_nll"],
        steps=len(seconds),
        seconds=sum(seconds),
        step_seconds=median(seconds),
    )


def with_loss(training: Training, folder: Path, rows: Iterable[Any], by: SelectBy) -> Training:
    """`training` with the loss of its cached validation predictions, if it is done.

    Args:
        rows: of the validation split, with their right answers.

    Raises:
        RunFolderError: the predictions are missing, damaged, or of other rows.
        ConfigError: the rows have no such score.
    """
    if training.state != "done":
        return training
    paths = RunPaths(folder / training.run)
    split = join_labels(read_predictions(paths.predictions, "validation"), rows, f"{training.name}: predictions")
    return replace(training, validation_loss=split.loss(split.outputs[:1], by).point())


def write_comparison(paths: RunPaths, label: str, trainings: Sequence[Training]) -> None:
    """compare.json, whole or not at all."""
    content = {"label": label, "reference": REFERENCE, "trainings": [asdict(one) for one in trainings]}
    write_json(paths.comparison, content)


def read_comparison(paths: RunPaths) -> list[Training] | None:
    """The trainings in compare.json; None where the folder is no comparison.

    Raises:
        RunFolderError: the file is damaged.
    """
    if not paths.comparison.is_file():
        return None
    try:
        return [Training(**entry) for entry in read_json(paths.comparison)["trainings"]]
    except (KeyError, TypeError) as error:
        raise RunFolderError(str(paths.comparison), None, f"is damaged ({error})", "Compare again.") from error


def values_text(values: Mapping[str, Any]) -> str:
    """`lr 0.0005, rank 8`: as short as it stays clear."""
    return ", ".join(f"{_SHORT.get(key, key.rpartition('.')[2])} {_text(value)}" for key, value in values.items())


def shared_part(config: RunConfig) -> RunConfig:
    """What may not change between two calls for one comparison: methods, values and read-out may."""
    free = ("compare", "ensemble", "select", "evaluate", "search", "export", "logging")
    return config.model_copy(update={name: RunConfig.model_fields[name].default for name in free})


def _adapter_values(method: str | NamedMethod) -> dict[str, Any]:
    """Dotted keys that make the adapter that of `method`, with the method's own rates.

    `adapter.rescale` is shared by the methods that have masks on the LoRA matrices; it says nothing about the others.
    """
    adapter = {"method": method} if isinstance(method, str) else method.adapter
    unset = UNSET_RATES if takes_rescale(adapter.get("method")) else {**UNSET_RATES, "adapter.rescale": "inverse"}
    return {**unset, **{f"adapter.{key}": value for key, value in adapter.items()}}


def _train_values(method: str | NamedMethod) -> dict[str, Any]:
    """Dotted keys of `train` in which `method` differs from the others."""
    if isinstance(method, str):
        return {}
    return {f"train.{key}": value for key, value in method.train.items()}


def _combinations(compare: CompareConfig, method: str | NamedMethod) -> list[dict[str, Any]]:
    """Every combination of the values that `method` is trained with.

    Raises:
        ConfigError: a key of the method's own that cannot vary, or one that it both fixes and varies.
    """
    settings, fixed = compare.settings_of(method), _train_values(method)
    if not isinstance(method, str):
        where = f"compare.methods: {method.name}"
        for key in fixed:
            _check_key(where, key)
        for key in method.vary:
            if key != LEARNING_RATE:
                _check_key(where, key, varies=True)
        if both := [key for key in settings if key in {*fixed, *(f"adapter.{own}" for own in method.adapter)}]:
            raise ConfigError(f"{where}: {both[0]}", None, "is both given and varied", "Keep one of the two.")
    return [dict(zip(settings, row, strict=True)) for row in itertools.product(*settings.values())]


def _check_key(where: str, key: str, varies: bool = False) -> None:
    if varies and key == "train.epochs":  # they are counted in steps before anything is planned
        raise ConfigError(f"{where}: {key}", None, "cannot vary", "Vary train.max_steps.")
    keys = [k for k in config_keys() if k.startswith(("adapter.", "train.")) and k not in (LEARNING_RATE, "train.seed")]
    if key not in keys:
        remedy = meant(key, keys) or f"It can vary: {', '.join(keys)}."
        raise ConfigError(f"{where}: {key}", None, "is not a key that can vary here", remedy)


def _method_name(method: str | NamedMethod) -> str:
    return method if isinstance(method, str) else method.name


def _folder_name(method: str, values: Mapping[str, Any], seed: int | None) -> str:
    parts = [method, *(f"{_SHORT.get(key, key.rpartition('.')[2])}{_text(value)}" for key, value in values.items())]
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts + ([] if seed is None else [f"seed{seed}"])))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
