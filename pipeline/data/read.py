"""Records of a data file, each with the place it came from.

A fault that concerns one record is yielded in its place, so that a check can name several at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pipeline.data.formats.json_text import read_json, read_jsonl
from pipeline.data.formats.packed import COMPRESSIONS, TORN, suffix_of
from pipeline.data.formats.parquet import read_parquet
from pipeline.data.formats.record import Record
from pipeline.data.formats.table import read_csv, read_tsv
from pipeline.errors import DataError

READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}

SUFFIXES = (*READERS, *(f"{suffix}{end}" for end in COMPRESSIONS for suffix in READERS if suffix != ".parquet"))
"""How the names of data files end: text may be compressed, Parquet is."""

HEADLESS: dict[str, Callable[..., Iterator[Record]]] = {".csv": read_csv, ".tsv": read_tsv}
"""Readers of files that may lack a header line."""


def read_file(path: Path, columns: tuple[str, ...] | None = None) -> Iterator[Record]:
    """Records of a .jsonl, .json (array of objects), .csv, .tsv or .parquet file, text files perhaps compressed.

    Args:
        columns: names of the columns of a table without a header line.

    Raises:
        DataError: unknown suffix, a file that cannot be read at all, or columns for one that names its own.
    """
    suffix = suffix_of(path)
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            "data.path", str(path), f"must end in {', '.join(READERS)} (or be text and compressed:"
            f" {', '.join(COMPRESSIONS)} behind that)", "Convert the file, or rename it.",
        )
    try:
        if not path.exists():
            raise DataError("data.path", str(path), "does not exist", "Check the path.")
        if not path.is_file():  # a pipe would be waited for, a device has no end
            raise DataError(
                "data.path", str(path), "is no regular file but a folder, pipe, socket or device",
                "Give a file, or a folder of files.",
            )
        reader = READERS[suffix]
        if columns is not None:
            if suffix not in HEADLESS:
                raise DataError(
                    "data.columns", list(columns), f"names columns of a .csv or .tsv file, and {path.name} is none",
                    "Leave it out.",
                )
            reader = partial(HEADLESS[suffix], columns=columns)
        yield from reader(path)
    except (OSError, *TORN) as error:
        raise DataError("data.path", str(path), f"cannot be read ({error})", "Check the file.") from error
