"""Records of a data file, each with the place it came from.

A fault that concerns one record is yielded in its place, so that a check can name several at once.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

Record = tuple[str, dict[str, Any] | DataError]
"""(file and line, column -> value or what is wrong with the record)."""

LONGEST_CELL = 2**31 - 1
"""Characters; the csv module's own limit of 131,072 is shorter than some documents."""


def read_file(path: Path) -> Iterator[Record]:
    """Records of a .jsonl, .json (array of objects), .csv, .tsv or .parquet file.

    CSV follows RFC 4180 (quotes around cells); TSV has no quoting, a tab or line break cannot be in a cell.

    Raises:
        DataError: unknown suffix, or a file that cannot be read at all.
    """
    if path.suffix not in READERS:
        raise DataError("data.path", str(path), f"must end in {', '.join(READERS)}", "Convert the file, or rename it.")
    try:
        yield from READERS[path.suffix](path)
    except FileNotFoundError as error:
        raise DataError("data.path", str(path), "does not exist", "Check the path.") from error
    except OSError as error:
        raise DataError("data.path", str(path), f"cannot be read ({error})", "Check the file.") from error


def _decoded_lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """Lines with their numbers; ends at the first that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, DataError(
                    f"{path}:{number}", line[error.start : error.start + 8],
                    f"is not UTF-8 (byte {error.start + 1} of the line)", "Save the file as UTF-8.",
                )
                return


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in _decoded_lines(path):
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            try:
                yield where, _object(json.loads(line), where)
            except json.JSONDecodeError as error:
                yield where, DataError(
                    where, line.strip(), f"is not valid JSON ({error.msg}, column {error.colno})",
                    "Write one JSON object per line.",
                )


def _read_json(path: Path) -> Iterator[Record]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except UnicodeDecodeError as error:
        raise DataError(str(path), None, f"is not UTF-8 (byte {error.start + 1})", "Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}", None, f"is not valid JSON ({error.msg}, column {error.colno})",
            "Write one array of objects; a file with one object per line ends in .jsonl.",
        ) from error
    if not isinstance(records, list):
        raise DataError(str(path), None, "must hold an array of objects", "Pick out the array, or use .jsonl.")
    for number, record in enumerate(records, start=1):
        where = f"{path}: row {number}"
        yield where, _object(record, where)


def _object(record: Any, where: str) -> dict[str, Any] | DataError:
    if isinstance(record, dict):
        return record
    return DataError(where, record, "is not a JSON object", 'Write {"prompt": …}.')


def _read_csv(path: Path, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> Iterator[Record]:
    faults: list[DataError] = []

    def lines() -> Iterator[str]:
        for _, line in _decoded_lines(path):
            if isinstance(line, DataError):
                faults.append(line)
                return
            yield line

    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, where)
            else:
                yield where, _named_cells(header, cells, where)
    except csv.Error as error:
        if not faults:  # a line that cannot be decoded ends the text early, perhaps inside quotes
            yield f"{path}:{start}", DataError(
                f"{path}:{start}", None, f"cannot be split into cells ({error})",
                'Put texts with quotes or line breaks in "quotes", and write a quote inside as "".',
            )
    for fault in faults:
        yield fault.field, fault


def _read_tsv(path: Path) -> Iterator[Record]:
    return _read_csv(path, "\t", csv.QUOTE_NONE)


def _checked_header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(where, names, f"names the column {twice[0]!r} twice", "Rename one of the two.")
    return names


def _named_cells(header: list[str], cells: list[str], where: str) -> dict[str, Any] | DataError:
    if len(cells) != len(header):
        return DataError(
            where, cells, f"has {len(cells)} cells, and the header names {len(header)} ({', '.join(header)})",
            "Mend the row. Texts that hold the separator or line breaks fit a quoted .csv or a .jsonl.",
        )
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            "data.path", str(path), f"is not a Parquet file ({error})", "Write it again, or use .jsonl."
        ) from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
