"""The spaces of a search on a configuration: the dimensions that its method uses, and those that plain LoRA has.

Both are *arms* of one search: tuned apart, by the same rule, with as many trials each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

from pipeline import (
    OF_DROPOUT,
    ONE_RATE,
    SERVED_RANKS,
    SITE_RATE,
    TERM_WEIGHT,
    AdapterConfig,
    ConfigError,
    DimensionFile,
    RunConfig,
    UserError,
    find_space,
    read_space,
    with_values,
    without_dropout,
)
from tune.dimensions import Dimension, Options, Range, Space, Values

ArmName = Literal["method", "plain"]
ARM_TEXTS: dict[str, str] = {"method": "the method", "plain": "plain LoRA"}


@dataclass(frozen=True)
class Arm:
    """What is tuned by itself."""

    name: ArmName
    config: RunConfig
    space: Space
    trials: int

    def trial_name(self, index: int) -> str:
        """trial_000, trial_001, ... of the method; plain_000, ... of plain LoRA."""
        return f"{'trial' if self.name == 'method' else self.name}_{index:03d}"


def load_arms(config: RunConfig) -> list[Arm]:
    """The method, and plain LoRA where `search.plain` wants it tuned, it is not the method itself, and the space has
    something for it. A finite space of fewer points than `search.trials` gives plain LoRA fewer trials.

    Raises:
        ConfigError: as `load_space`.
    """
    arms = [Arm("method", config, load_space(config), config.search.trials)]
    plain = without_dropout(config)
    if not config.search.plain or plain.adapter.resolved_method() == config.adapter.resolved_method():
        return arms
    path = find_space(config.search.space)
    if entries := {key: entry for key, entry in read_space(path).items() if not key.startswith(OF_DROPOUT)}:
        space = _tried_space(plain, entries, path)
        count = space.count()
        arms.append(Arm("plain", plain, space, min(config.search.trials, count or config.search.trials)))
    return arms


def load_space(config: RunConfig) -> Space:
    """Read `config.search.space` and try its extremes on `config`, before anything starts.

    Raises:
        ConfigError: file not found, unknown key, a key that a search cannot vary, an illegal value, or
            more trials than the space has points.
    """
    path = find_space(config.search.space)
    entries = read_space(path)
    used = {key: entry for key, entry in entries.items() if not entry.if_used or _is_used(key, entries, config.adapter)}
    if not used:
        raise ConfigError(str(path), None, "has no dimension that the method in force uses", "Add train.learning_rate.")
    space = _tried_space(config, used, path)
    _check_trials(space, config.search.trials)
    return space


def _tried_space(config: RunConfig, used: Mapping[str, DimensionFile], path: Path) -> Space:
    present = {key: reduce(getattr, key.split("."), config) for key in used}
    space = Space(str(path), {key: _read_dimension(key, entry, path, present[key]) for key, entry in used.items()})
    for values in space.corners():
        try:
            trial_config(config, values, "trial")
        except UserError as error:
            shown = ", ".join(f"{key}={value!r}" for key, value in values.items())
            fault = f"allows {shown}, which is no valid run: {error}"
            raise ConfigError("search.space", space.source, fault) from error
    return space


def trial_config(config: RunConfig, values: Values, name: str, packed: bool = False) -> RunConfig:
    """The run of one trial: `config` with `values`, `search.max_steps` steps and its name in the label."""
    steps = config.search.max_steps
    validations = validation_steps(config.train.validate_every_steps, steps)
    # A trial by itself is short and is rerun rather than resumed: periodic checkpoints would only fill the disk. With
    # a pack many end at once.
    of_a_trial = {
        "train.max_steps": steps,
        "train.validate_every_steps": validations,
        "train.checkpoint_every_steps": validations if packed else steps,
        "train.keep_checkpoints": 1,
        "train.patience": None,  # else trials would be compared at different steps
        "label": f"{config.label}: {name}" if config.label else name,
    }
    return with_values(config, {**of_a_trial, **values})


def packing_refusal(config: RunConfig, arms: Sequence[Arm]) -> str:
    """Why the search's trials train one by one; empty where they can be packed."""
    if config.search.workers_per_trial > 1:
        return f"a trial of {config.search.workers_per_trial} processes is no part of a pack"
    from pipeline import pack_refusal

    points = ((arm, values) for arm in arms for values in arm.space.corners())
    refusals = (pack_refusal(config, trial_config(arm.config, values, "trial", packed=True)) for arm, values in points)
    return next((refusal for refusal in refusals if refusal), "")


def validation_steps(asked: int, max_steps: int) -> int:
    """Steps between validations of a trial: at least one falls before its end, where it can be stopped early."""
    return min(asked, max(1, max_steps // 2))


def _is_used(key: str, entries: Mapping[str, DimensionFile], adapter: AdapterConfig) -> bool:
    """Whether the method in force has the rate (or term) that `key` names, and no other dimension sets it."""
    if key == TERM_WEIGHT:
        return adapter.resolved_method().consistency.kind != "none"
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
    count, grid = space.count(), space.grid_count()
    if count is not None and trials > count:
        raise ConfigError("search.trials", trials, f"exceeds the {count} points of {space.source}", f"Set {count}.")
    if trials < grid:
        raise ConfigError("search.trials", trials, f"is below the {grid} grid points of {space.source}", f"Set {grid}.")
