"""What a space file may say: dotted configuration keys, and the values a search tries of each.

A space file maps keys of `RunConfig` to one of

    choice: [a, b, ...]        one of these
    grid: [a, b, ...]          every one of these, in turn
    uniform: [low, high]       evenly in between (whole numbers where the key holds whole numbers)
    loguniform: [low, high]    evenly in the logarithm

A rate, or the weight of the consistency term, with `if_used: true` beside them is left out where the method in force
does not have it: `adapter.rate` fits a method with one rate, `adapter.rates.POSITION` one with a site there, unless
`adapter.rate` already sets it, `adapter.consistency.weight` one with such a term. Without it such a dimension is an
error. A range over `adapter.rank` means the ranks within it that vLLM serves; a `choice` is
taken as written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config.load import config_keys, read_yaml, validate
from pipeline.config.names.hints import meant
from pipeline.errors import ConfigError, UserError

SPACES = Path(__file__).resolve().parents[2] / "tune" / "spaces"

SEARCHABLE = ("adapter.", "train.")
"""A trial's score may depend on nothing but these sections: all trials share base, rows and templates."""

ONE_RATE, SITE_RATE, TERM_WEIGHT = "adapter.rate", "adapter.rates.", "adapter.consistency.weight"

OF_DROPOUT = ("adapter.method", "adapter.rate", "adapter.rescale", "adapter.consistency", "train.draw")
"""Beginnings of the keys that say what is dropped, and how: plain LoRA has none of them."""

FIXED = {
    "train.max_steps": "search.max_steps sets the length of a trial.",
    "train.validate_every_steps": "Trials are compared at the same steps.",
    "train.checkpoint_every_steps": "It does not change what is trained.",
    "train.keep_checkpoints": "It does not change what is trained.",
    "train.patience": "search.early_exit ends trials early.",
    "train.keep_best": "Trials are compared by the same rule.",
    "train.deepspeed": "It does not change what is trained.",
    "train.activation_checkpointing": "It does not change what is trained.",
    "adapter.fused": "It does not change what is trained.",
}
"""Key -> why a search does not vary it."""

MOST_LISTED = 1000
"""Values of one dimension: each of them is tried on the configuration before a search starts."""

Listed = Annotated[list[Any], Field(max_length=MOST_LISTED)]


class DimensionFile(BaseModel):
    """One dimension as the file states it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    choice: Listed | None = None
    """One of these."""
    grid: Listed | None = None
    """Every one of these, in turn."""
    uniform: list[float] | None = None
    """[low, high]"""
    loguniform: list[float] | None = None
    """[low, high], both above 0"""
    if_used: bool = False
    """Of a dropping rate or the consistency term's weight: leave it out where the method in force does not have it."""

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


def find_space(source: str) -> Path:
    """A path as given, or the file of that name in tune/spaces. Raises `ConfigError` where there is neither."""
    names = {path.stem: path for path in sorted(SPACES.glob("*.yaml"))}
    if not os.path.isfile(source) and source in names:
        return names[source]
    if source and os.path.exists(source):
        return Path(source)  # who reads it says what is wrong with it
    raise ConfigError("search.space", source, "is neither a file nor a known space", f"Known: {', '.join(names)}.")


def read_space(path: Path) -> dict[str, DimensionFile]:
    """Dotted key -> dimension.

    Raises:
        ConfigError: no space, a key that is unknown or cannot be searched, an illegal dimension.
    """
    tree = read_yaml(path)
    if not tree:
        raise ConfigError(str(path), None, "has no dimension", "Example: `adapter.rate: {uniform: [0.1, 0.6]}`.")
    return {key: _read_entry(key, entry, path) for key, entry in tree.items()}


def _read_entry(key: str, entry: object, path: Path) -> DimensionFile:
    where = f"{path}: {key}"
    if key in FIXED:
        raise ConfigError(where, None, "cannot be searched", FIXED[key])
    keys = [k for k in config_keys() if k.startswith(SEARCHABLE) and k not in FIXED]
    if key not in keys:
        remedy = meant(key, keys) or f"It can vary: {', '.join(keys)}."
        raise ConfigError(where, None, "is not a key a search can vary", remedy)
    if not isinstance(entry, dict):
        raise ConfigError(where, entry, "must be a mapping", f"Example: `{key}: {{choice: [...]}}`.")
    try:
        found = validate(DimensionFile, entry)
    except UserError as error:
        raise ConfigError(where, None, str(error)) from error
    if found.if_used and key not in (ONE_RATE, TERM_WEIGHT) and not key.startswith(SITE_RATE):
        fits = f"if_used is for {ONE_RATE}, {SITE_RATE}POSITION and {TERM_WEIGHT}."
        raise ConfigError(where, None, "is always used", fits)
    return found


def _number(value: object) -> object:
    """YAML 1.1 reads 1e-4 (no dot) as text; people mean the number."""
    if isinstance(value, str) and any(c.isdigit() for c in value):
        try:
            return float(value)
        except ValueError:
            return value
    return value
