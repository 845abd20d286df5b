"""What a search varies: dotted configuration keys and the values each may take.

A space file maps keys of `RunConfig` to one of

    choice: [a, b, ...]        one of these
    grid: [a, b, ...]          every one of these, in turn
    uniform: [low, high]       evenly in between (whole numbers where the key holds whole numbers)
    loguniform: [low, high]    evenly in the logarithm

A rate with `if_used: true` beside them is left out where the method in force does not have it: `adapter.rate` fits a
method with one rate, `adapter.rates.POSITION` one with a site there, unless `adapter.rate` already sets it. Without it
such a dimension is an error. A range over `adapter.rank` means the ranks within it that vLLM serves; a `choice` is
taken as written.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from pipeline import (
    SERVED_RANKS,
    AdapterConfig,
    ConfigError,
    RunConfig,
    UserError,
    config_keys,
    read_yaml,
    validate,
    with_values,
)
from tune.dimensions import Dimension, Options, Range, Space, Values

SPACES = Path(__file__).resolve().parent / "spaces"

SEARCHABLE = ("adapter.", "train.")
"""A trial's score may depend on nothing but these sections: all trials share base, rows and templates."""

ONE_RATE, SITE_RATE = "adapter.rate", "adapter.rates."

FIXED = {
    "train.max_steps": "search.max_steps sets the length of a trial.",
    "train.validate_every_steps": "Trials are compared at the same steps.",
    "train.checkpoint_every_steps": "It does not change what is trained.",
    "train.keep_checkpoints": "It does not change what is trained.",
    "train.keep_best": "Trials are compared by the same rule.",
    "train.deepspeed": "It does not change what is trained.",
    "train.activation_checkpointing": "It does not change what is trained.",
}


class DimensionFile(BaseModel):
    """One dimension as the file states it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    choice: list[Any] | None = None
    """One of these."""
    grid: list[Any] | None = None
    """Every one of these, in turn."""
    uniform: list[float] | None = None
    """[low, high]"""
    loguniform: list[float] | None = None
    """[low, high], both above 0"""
    if_used: bool = False
    """Of a dropping rate: leave the dimension out where the method in force does not have it."""

    @field_validator("*", mode="before")
    @classmethod
    def _read_numbers(cls, values: object) -> object:
        return [_number(value) for value in values] if isinstance(values, list) else values

    @model_validator(mode="after")
    def _check(self) -> DimensionFile:
        given = [name for name, value in self if name != "if_used" and value is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"needs exactly one of choice, grid, uniform, loguniform, got {found}")
        values = getattr(self, given[0])
        if given[0] in ("choice", "grid"):
            if not values or len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
                raise ValueError(f"{given[0]} must list at least one value and none twice")
        elif len(values) != 2 or not values[0] < values[1] or (given[0] == "loguniform" and values[0] <= 0):
            raise ValueError(f"{given[0]} must be [low, high] with {'0 < ' if 'log' in given[0] else ''}low < high")
        return self


def load_space(config: RunConfig) -> Space:
    """Read `config.search.space` and try its extremes on `config`, before anything starts.

    Raises:
        ConfigError: file not found, unknown key, a key that a search cannot vary, an illegal value, or
            more trials than the space has points.
    """
    path = _find(config.search.space)
    tree = read_yaml(path)
    if not tree:
        raise ConfigError(str(path), None, "has no dimension", "Example: `adapter.rate: {uniform: [0.1, 0.6]}`.")
    entries = {str(key): _read_entry(str(key), entry, path) for key, entry in tree.items()}
    used = {key: entry for key, entry in entries.items() if not entry.if_used or _is_used(key, entries, config.adapter)}
    if not used:
        raise ConfigError(str(path), None, "has no dimension that the method in force uses", "Add train.learning_rate.")
    present = {key: reduce(getattr, key.split("."), config) for key in used}
    space = Space(str(path), {key: _read_dimension(key, entry, path, present[key]) for key, entry in used.items()})
    for values in space.corners():
        try:
            trial_config(config, values, "trial")
        except UserError as error:
            shown = ", ".join(f"{key}={value}" for key, value in values.items())
            fault = f"allows {shown}, which is no valid run: {error}"
            raise ConfigError("search.space", space.source, fault) from error
    _check_trials(space, config.search.trials)
    return space


def trial_config(config: RunConfig, values: Values, name: str) -> RunConfig:
    """The run of one trial: `config` with `values`, `search.max_steps` steps and its name in the label."""
    steps = config.search.max_steps
    # A trial is short and is rerun rather than resumed: periodic checkpoints would only fill the disk.
    of_a_trial = {
        "train.max_steps": steps,
        "train.validate_every_steps": validation_steps(config.train.validate_every_steps, steps),
        "train.checkpoint_every_steps": steps,
        "train.keep_checkpoints": 1,
        "label": f"{config.label}: {name}" if config.label else name,
    }
    return with_values(config, {**of_a_trial, **values})


def validation_steps(asked: int, max_steps: int) -> int:
    """Steps between validations of a trial: at least one falls before its end, where it can be stopped early."""
    return min(asked, max(1, max_steps // 2))


def _find(source: str) -> Path:
    for path in (Path(source), SPACES / f"{source}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in SPACES.glob("*.yaml")))
    raise ConfigError("search.space", source, "is neither a file nor a known space", f"Known: {names}.")


def _read_entry(key: str, entry: object, path: Path) -> DimensionFile:
    where = f"{path}: {key}"
    if key in FIXED:
        raise ConfigError(where, None, "cannot be searched", FIXED[key])
    keys = [k for k in config_keys() if k.startswith(SEARCHABLE) and k not in FIXED]
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"It can vary: {', '.join(keys)}."
        raise ConfigError(where, None, "is not a key a search can vary", remedy)
    if not isinstance(entry, dict):
        raise ConfigError(where, entry, "must be a mapping", f"Example: `{key}: {{choice: [...]}}`.")
    try:
        found = validate(DimensionFile, entry)
    except UserError as error:
        raise ConfigError(where, None, str(error)) from error
    if found.if_used and key != ONE_RATE and not key.startswith(SITE_RATE):
        raise ConfigError(where, None, "is always used", f"if_used is for {ONE_RATE} and {SITE_RATE}POSITION.")
    return found


def _is_used(key: str, entries: Mapping[str, DimensionFile], adapter: AdapterConfig) -> bool:
    """Whether the method in force has the rate that `key` names, and no other dimension sets it."""
    if key == ONE_RATE:
        return adapter.takes_one_rate()
    if ONE_RATE in entries and adapter.takes_one_rate():
        return False
    return any(site.position == key.removeprefix(SITE_RATE) for site in adapter.resolved_method().sites)


def _read_dimension(key: str, entry: DimensionFile, path: Path, present: object) -> Dimension:
    """`present`: the value in force, whose type says whether the dimension is of whole numbers."""
    options = entry.choice or entry.grid
    if options is not None:
        return Options(tuple(options), grid=entry.grid is not None)
    low, high = entry.uniform or entry.loguniform or []
    whole = isinstance(present, int) and not isinstance(present, bool)
    if whole and (low != int(low) or high != int(high)):
        raise ConfigError(f"{path}: {key}", [low, high], "must be whole numbers")
    if key == "adapter.rank":
        ranks = tuple(rank for rank in SERVED_RANKS if low <= rank <= high)
        if not ranks:
            remedy = f"Served: {', '.join(map(str, SERVED_RANKS))}; or list a choice."
            raise ConfigError(f"{path}: {key}", [low, high], "holds no rank that vLLM serves", remedy)
        return Options(ranks)
    return Range(low, high, log=entry.loguniform is not None, whole=whole)


def _check_trials(space: Space, trials: int) -> None:
    count, grid = space.count(), len(space.grid())
    if count is not None and trials > count:
        raise ConfigError("search.trials", trials, f"exceeds the {count} points of {space.source}", f"Set {count}.")
    if trials < grid:
        raise ConfigError("search.trials", trials, f"is below the {grid} grid points of {space.source}", f"Set {grid}.")


def _number(value: object) -> object:
    """YAML 1.1 reads 1e-4 (no dot) as text; people mean the number."""
    if isinstance(value, str) and any(c.isdigit() for c in value):
        try:
            return float(value)
        except ValueError:
            return value
    return value
