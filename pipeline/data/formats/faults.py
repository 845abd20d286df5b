"""All faults of a file in one message: the first of each kind with their lines, and how many there are."""

from __future__ import annotations

import re

from pipeline.errors import DataError, UserError, joined

SHOWN = 3
"""Faults of a kind that are written out."""
MOST_KINDS = 10
"""Kinds that are written out; beyond them nothing new is learnt."""


class Faults:
    """The faults found so far."""

    def __init__(self, name: str) -> None:
        """`name` is the file's, for the count of what is not written out."""
        self._name = name
        self._shown: dict[str, list[DataError]] = {}
        self._counts: dict[str, int] = {}

    def add(self, error: DataError) -> None:
        """One more."""
        kind = _kind(error)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        shown = self._shown.setdefault(kind, []) if len(self._shown) < MOST_KINDS or kind in self._shown else None
        if shown is not None and len(shown) < SHOWN:
            shown.append(error)

    def errors(self) -> list[UserError]:
        """What is written out, kind by kind."""
        found: list[UserError] = []
        for kind, errors in self._shown.items():
            found += errors
            if more := self._counts[kind] - len(errors):
                found.append(DataError(self._name, None, f"has {more:,} more rows with such a fault ({kind})"))
        if others := len(self._counts) - len(self._shown):
            found.append(DataError(self._name, None, f"has {others:,} more kinds of faults"))
        return found

    def refuse(self) -> None:
        """Raises `DataError` (an `ErrorList` where several), if there are any."""
        if errors := self.errors():
            raise joined(errors)


def _kind(error: DataError) -> str:
    """Faults are of one kind if column and sentence agree but for numbers and what is quoted."""
    column = error.field.rpartition(": ")[2] if ": " in error.field else ""
    column = re.sub(r"\[\d+\]", "", column) if not re.fullmatch(r"row \d+", column) else ""
    sentence = re.sub(r"'[^']*'|\"[^\"]*\"", "…", error.constraint)
    sentence = re.sub(r"\d[\d,.]*", "N", sentence)
    return f"{column}: {sentence}" if column else sentence
