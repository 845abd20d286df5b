"""What a source looks like, seen from its first records: names of columns and kinds of values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.config import TemplateConfig
from pipeline.data.formats.record import Unusable
from pipeline.data.shapes.turns import from_json
from pipeline.errors import DataError


@dataclass(frozen=True)
class Shape:
    """What rows are read as."""

    name: str
    """For people: `Alpaca`."""
    template: TemplateConfig | None = None
    """How columns become rows; None where they are named as the reader wants them."""
    note: str = ""
    """What else should be said of it."""


@dataclass(frozen=True)
class Table:
    """A source's first records, and a way to all values of a column."""

    head: Sequence[Mapping[str, Any]]
    all_values: Callable[[str], Iterable[Any]]
    """Column -> its values over the rows that classes are taken from."""
    key: str = "data.path"
    name: str = ""
    """Configuration key and value that errors about the source name."""
    classifier: bool = False
    """A model with a head reads it: a pair of texts stays a pair."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column of whole numbers -> names of its classes, where the source itself says them."""
    own: TemplateConfig = TemplateConfig()
    """What the user's template says; it wins."""

    @cached_property
    def columns(self) -> list[str]:
        """Names over the first records, in their order."""
        return list(dict.fromkeys(name for record in self.head for name in record))

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return {name.strip().casefold(): name for name in reversed(self.columns)}

    def find(self, *names: str) -> str | None:
        """The first of the names that is a column, whatever its case."""
        return next((self._by_name[name.casefold()] for name in names if name.casefold() in self._by_name), None)

    def texts(self, *names: str) -> str | None:
        """The same of columns that hold texts or numbers."""
        found = (self.find(name) for name in names)
        return next((name for name in found if name is not None and self.holds(name, _is_text)), None)

    def lists(self, *names: str) -> str | None:
        """The same of columns that hold lists, or mappings of lists."""
        found = (self.find(name) for name in names)
        return next((name for name in found if name is not None and self.holds(name, _is_list)), None)

    def holds(self, column: str, kind: Callable[[Any], bool]) -> bool:
        """Whether every value of the first records is of this kind, and one is there."""
        values = self.seen(column)
        return bool(values) and all(kind(value) for value in values)

    def seen(self, column: str) -> list[Any]:
        """The column's values in the first records, without missing ones."""
        values = (record.get(column) for record in self.head)
        return [value for value in values if value is not None and not isinstance(value, Unusable)]

    def lacking(self, column: str) -> bool:
        """Whether some of the first records do not have the column at all."""
        return any(column not in record for record in self.head)


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _is_list(value: Any) -> bool:
    try:
        return isinstance(from_json(value, ""), list | tuple | Mapping)
    except DataError:
        return False
