"""Lines of a text file, none longer than can be held."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.data.formats.packed import open_bytes
from pipeline.errors import DataError
from pipeline.files import LONGEST_LINE


def decoded_lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """Lines with their numbers; ends at the first that is not UTF-8, or longer than `LONGEST_LINE` bytes."""
    with open_bytes(path) as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), start=1):
            if len(line) > LONGEST_LINE:
                yield number, too_long(f"{path}:{number}", "line")
                return
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, DataError(
                    f"{path}:{number}", line[error.start : error.start + 8],
                    f"is not UTF-8 (byte {error.start + 1} of the line)", "Save the file as UTF-8.",
                )
                return


def too_long(where: str, what: str) -> DataError:
    """The error of a line or row (`what`) that goes on beyond `LONGEST_LINE`."""
    return DataError(
        where, None, f"is a {what} of more than {LONGEST_LINE >> 20} MiB",
        "Cut the text into rows, or close its quotes or brackets; what no column needs can be left out.",
    )
