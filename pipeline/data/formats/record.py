"""What a reader gives: a record, or what is wrong with it; values that nothing can be made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError

Record = tuple[str, dict[str, Any] | DataError]
"""(file and line, column -> value or what is wrong with the record)."""


@dataclass(frozen=True)
class Unusable:
    """Stands for a value that cannot be read. Most columns are never asked for, so it is refused only where one is."""

    what: str
    """What it is, after "is ": `no UTF-8 text`."""

    def fault(self, field: str) -> DataError:
        """The error of whoever needs the value; `field` names file, row and column."""
        return DataError(field, None, f"is {self.what}", "Mend the value, or leave the row out.")
