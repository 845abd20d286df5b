"""Parquet: columns of any type; a value that Python cannot hold stands in nobody's way unless it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.formats.record import Record, Unusable
from pipeline.data.formats.table import refuse_twice
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pyarrow import Array

_BATCH = 1000
"""Rows turned into Python values at a time."""


def read_parquet(path: Path) -> Iterator[Record]:
    """Rows by the names of the columns.

    Raises:
        DataError: no Parquet file, a damaged one, or two columns of one name.
    """
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            refuse_twice(names, str(path))
            for batch in table.iter_batches(batch_size=_BATCH):
                for cells in zip(*map(_values, batch.columns), strict=True):
                    number += 1
                    yield f"{path}: row {number}", dict(zip(names, cells, strict=True))
    except DataError:
        raise
    except Exception as error:  # what a damaged file raises depends on where it is damaged: ArrowInvalid, OSError, …
        what = f"cannot be read beyond row {number}" if number else "is not a Parquet file that can be read"
        raise DataError("data.path", str(path), f"{what} ({error})", "Write it again, or use .jsonl.") from error


def _values(column: Array) -> list[Any]:
    """Python values of a column, `Unusable` where there is none: bad UTF-8, a date beyond the year 9999, …."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except Exception:  # every type raises what it likes
        return [_value(column, index) for index in range(len(column))]


def _value(column: Array, index: int) -> Any:
    try:
        return column[index].as_py()
    except UnicodeDecodeError:
        return Unusable("no UTF-8 text")
    except Exception as error:
        return Unusable(f"a {column.type} that cannot be read ({error})")
