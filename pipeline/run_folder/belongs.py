"""Whether a folder takes a configuration: what was trained in it decides, and a refusal names the keys that differ.

A folder in which nothing was trained takes any: what was refused, or failed before its first step, binds nobody.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import RunFolderError
from pipeline.files import remove_folder
from pipeline.run_folder.paths import RunPaths, load_saved
from pipeline.run_folder.related import LEDGER, SEARCH

TRIALS = "trials"
MOST_KEYS = 10
"""Keys that a refusal names."""
_LONGEST_VALUE = 60
_ABSENT = object()


def holds_training(run: Path) -> bool:
    """Whether a run folder holds a step of a training, or what came of one."""
    paths = RunPaths(run)
    return any(made.exists() for made in (paths.metrics, paths.checkpoints, paths.adapter))


def holds_trainings(folder: Path) -> bool:
    """Whether one of the run folders in `folder` does: the trials of a search, the trainings of a comparison."""
    return folder.is_dir() and any(holds_training(run) for run in folder.iterdir() if run.is_dir())


def forget_untrained(search: Path) -> None:
    """Remove what a search in which no trial has taken a step has drawn: it belongs to the settings of that start."""
    for name in (LEDGER, SEARCH):
        (search / name).unlink(missing_ok=True)
    if (search / TRIALS).is_dir():
        remove_folder(search / TRIALS)


def is_other(saved: Path, config: RunConfig, part: Callable[[RunConfig], RunConfig]) -> bool:
    """Whether a configuration is saved that differs from `config` in the part that counts."""
    return saved.exists() and part(load_saved(saved)).result_sha256() != part(config).result_sha256()


def refuse_other(saved: Path, config: RunConfig, part: Callable[[RunConfig], RunConfig] = lambda whole: whole) -> None:
    """Raises `RunFolderError` where a configuration that asks for another result (in the part that counts) is saved.

    It names the keys that differ, with both values, and what the folder would have taken.
    """
    if not is_other(saved, config, part):
        return
    held = load_saved(saved)
    binding = dict(differences(part(held).result_values(), part(config).result_values()))
    taken = [key for key, _ in differences(held.model_dump(mode="json"), config.model_dump(mode="json"))
             if not any(_touch(key, other) for other in binding)]
    named = [f"{key} is {_shown(there)} there and {_shown(here)} here" for key, (there, here) in binding.items()]
    what = f"belongs to another configuration: {_listed(named, '; ')}"
    if taken:
        what += f". What else differs it would take: {_listed(taken, ', ')}"
    remedy = f"Put those keys back (--config {saved} has them all), or give another --run-dir."
    raise RunFolderError("--run-dir", str(saved.parent), what, remedy)


def differences(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(dotted key, both values) of every leaf in which two trees of settings differ."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in dict.fromkeys((*there, *here)):
            below = f"{key}.{name}" if key else str(name)
            yield from differences(there.get(name, _ABSENT), here.get(name, _ABSENT), below)
    elif there != here:
        yield key, (there, here)


def _touch(key: str, other: str) -> bool:
    """Whether one is the other, or lies within it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _shown(value: Any) -> str:
    text = "not set" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _listed(parts: list[str], separator: str) -> str:
    more = len(parts) - MOST_KEYS
    return separator.join(parts[:MOST_KEYS]) + (f"{separator}and {more} more" if more > 0 else "")
