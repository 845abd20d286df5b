"""CSV follows RFC 4180 (quotes around cells); TSV has no quoting, a tab or line break cannot be in a cell."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.formats.lines import decoded_lines, too_long
from pipeline.data.formats.record import Record
from pipeline.errors import DataError
from pipeline.files import LONGEST_LINE


def read_csv(
    path: Path, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL, columns: Sequence[str] | None = None
) -> Iterator[Record]:
    """Rows by the names of the header line; the first fault that hides where rows begin is the last record.

    Args:
        columns: names for a file without a header line.
    """
    faults: list[DataError] = []
    start, taken = 1, 0

    def lines() -> Iterator[str]:
        nonlocal taken
        for _, line in decoded_lines(path):
            taken += 0 if isinstance(line, DataError) else len(line)
            if taken > LONGEST_LINE:
                line = too_long(f"{path}:{start}", "row")  # within quotes that nobody closes
            if isinstance(line, DataError):
                faults.append(line)
                return
            yield line

    csv.field_size_limit(LONGEST_LINE)  # the module's own limit of 131,072 is shorter than some documents
    reader = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    header: list[str] | None = None
    if columns is not None:
        header = list(columns)
        refuse_twice(header, "data.columns")
    try:
        for cells in reader:
            where, start, taken = f"{path}:{start}", reader.line_num + 1, 0
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                refuse_twice(header, where)
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


def read_tsv(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The same for cells between tabs."""
    return read_csv(path, "\t", csv.QUOTE_NONE, columns)


def refuse_twice(names: list[str], where: str) -> None:
    """Raises `DataError` where two columns have one name."""
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise DataError(where, names[:20], f"names the column {name!r} twice", "Rename one of the two.")


def _named_cells(header: list[str], cells: list[str], where: str) -> dict[str, Any] | DataError:
    if len(cells) != len(header):
        return DataError(
            where, cells[:20], f"has {len(cells)} cells, and the header names {len(header)} ({', '.join(header[:20])})",
            "Mend the row. Texts that hold the separator or line breaks fit a quoted .csv or a .jsonl.",
        )
    return dict(zip(header, cells, strict=True))
