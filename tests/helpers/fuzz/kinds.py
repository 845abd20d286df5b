"""What there is to make: kind -> (random, number) -> case."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from helpers.fuzz import command_line, configuration, data_files, run_folders, shown_rows, templates
from helpers.fuzz.case import Case

KINDS: dict[str, Callable[[Random], Case]] = {
    "command_line": command_line.make,
    "configuration": configuration.make,
    "data_files": data_files.make,
    "templates": templates.make,
    "run_folders": run_folders.make,
    "shown_rows": shown_rows.make,
}
HEAVY = {"shown_rows"}
"""Kinds that need torch and transformers."""


def kind_of(number: int) -> str:
    """Kinds take turns."""
    return list(KINDS)[number % len(KINDS)]


def make_case(seed: int, number: int) -> Case:
    """Case `number`, a function of the two numbers alone."""
    return KINDS[kind_of(number)](Random(f"{seed}/{number}"))


def numbers_of(kind: str | None, cases: int) -> list[int]:
    """The first numbers of a kind, or of all."""
    if kind is None:
        return list(range(cases))
    return [list(KINDS).index(kind) + i * len(KINDS) for i in range(cases)]
