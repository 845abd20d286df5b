"""What other installed packages add, under names of their own, by entry points. A package says in its pyproject.toml:

    [project.entry-points."loradrop.mask_patterns"]
    blocks = "their_package.masks:blocks"

Its code is imported once a configuration asks for that name, and not before.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pipeline.errors import ConfigError

MASK_PATTERNS = "loradrop.mask_patterns"
"""`(uniforms, rate) -> keeps`: see `pipeline.adapters.masks.kept_entries`."""
TASKS = "loradrop.tasks"
"""A class in the place of one of those in `pipeline.prediction.task`."""

EXPORT_TARGETS = "loradrop.export_targets"
"""A `pipeline.export.order.Target`."""


def offered(group: str) -> dict[str, list[EntryPoint]]:
    """Name -> who offers it, of a group."""
    found: dict[str, list[EntryPoint]] = {}
    for one in sorted(entry_points(group=group), key=lambda one: one.name):
        found.setdefault(one.name, []).append(one)
    return found


def listed(group: str) -> str:
    """For errors: what installed packages offer in a group, and how one comes to offer something."""
    there = ", ".join(f"{name} ({_package(one)})" for name, (one, *_) in offered(group).items())
    how = f"a package adds one by an entry point of the group {group} (docs/python.md)"
    return f"installed packages add {there or 'none'}; {how}"


@functools.cache
def load(group: str, name: str) -> Any:
    """What a package offers under this name.

    Raises:
        ConfigError: nobody offers it, two packages do, or its code cannot be imported.
    """
    found = offered(group).get(name, [])
    if len(found) != 1:
        what = f"is offered by {' and '.join(map(_package, found))}" if found else f"is not there: {listed(group)}"
        raise ConfigError(group, name, what, "Install one package that offers it.")
    try:
        return found[0].load()
    except Exception as error:  # whatever a module of others does when it is imported
        what = f"cannot be loaded from {found[0].value} ({type(error).__name__}: {error})"
        raise ConfigError(group, name, what, f"Mend or remove the package {_package(found[0])}.") from error


def packages() -> dict[str, str]:
    """Package -> version of all that offer something, for the record of a run."""
    offers = [one for group in (MASK_PATTERNS, TASKS, EXPORT_TARGETS) for one in entry_points(group=group)]
    return {one.dist.name: one.dist.version for one in offers if one.dist is not None}


def _package(one: EntryPoint) -> str:
    return "a package without a name" if one.dist is None else one.dist.name
