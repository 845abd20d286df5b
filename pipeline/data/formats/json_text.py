"""JSON: one object per line, or an array of objects that is read element by element."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.data.formats.lines import decoded_lines, too_long
from pipeline.data.formats.packed import open_bytes
from pipeline.data.formats.record import Record, Unusable
from pipeline.errors import DataError
from pipeline.files import LONGEST_LINE

LONGEST_NUMBER = 600
"""Digits of a whole number. Python reads 4,300 by default, and can be told to read no more than 640."""
_TOO_DEEP = "is nested too deeply, hundreds of brackets within each other"
_CHUNK = 2**16
_BLANK = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = 16
"""Characters, at least those of -Infinity or an escape: an error nearer to the end of a text may be due to the cut."""


class JsonFault(Exception):
    """JSON that says what cannot be meant: a name twice, or brackets in brackets without end."""


def decode_json(text: str) -> Any:
    """The value of a JSON text; numbers of more than `LONGEST_NUMBER` digits are `Unusable`.

    Raises:
        JSONDecodeError: no JSON.
        JsonFault: an object that names something twice, or a text nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise JsonFault(_TOO_DEEP) from None


def read_jsonl(path: Path) -> Iterator[Record]:
    """One object per line; blank lines are passed over."""
    for number, line in decoded_lines(path):
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            try:
                yield where, _object_or_fault(decode_json(line), where)
            except json.JSONDecodeError as error:
                yield where, DataError(
                    where, line[:200].strip(), f"is not valid JSON ({error.msg}, column {error.colno})",
                    "Write one JSON object per line.",
                )
            except JsonFault as error:
                yield where, DataError(where, None, str(error), "Mend the row, or leave it out.")


def read_json(path: Path) -> Iterator[Record]:
    """Elements of an array; an empty file is an empty array.

    Raises:
        DataError: no array, no UTF-8, no JSON, or an element longer than `LONGEST_LINE`.
    """
    with open_bytes(path) as file:
        text = _Window(file, path)
        if not (mark := text.mark()):
            return
        if mark != "[":
            raise DataError(
                str(path), None, "must hold an array of objects",
                "Pick out the array; a file with one object per line ends in .jsonl.",
            )
        text.at += 1
        number, more = 0, text.mark() != "]"
        text.at += not more
        while more:
            number += 1
            where = f"{path}: row {number}"
            text.mark()
            try:
                yield where, _object_or_fault(text.value(where), where)
            except JsonFault as error:
                yield where, DataError(where, None, str(error), "Mend the row, or leave it out.")
                return
            mark = text.mark()
            if mark not in (",", "]"):
                raise text.fault("Expecting ',' delimiter", text.at)
            text.at += 1
            more = mark == ","
        if text.mark():
            raise text.fault("Extra data", text.at)


class _Window:
    """The stretch of a text file that is looked at, read on where it is too short."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._line, self._column, self._bytes, self._ended = 1, 1, 0, False
        self.text, self.at = "", 0

    def mark(self) -> str:
        """The next character that is not blank, which `at` then stands at; empty at the end of the file."""
        while True:
            found = _BLANK.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if self._ended:
                return ""
            self._read_on()

    def value(self, where: str) -> Any:
        """The JSON value that begins at `at`, which is moved behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self._ended:  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or len(self.text) - error.pos <= _LONGEST_WORD
                if self._ended or not cut:
                    raise self.fault(error.msg, error.pos) from error
            except RecursionError:
                raise JsonFault(_TOO_DEEP) from None
            if len(self.text) - self.at > LONGEST_LINE:
                raise too_long(where, "row")
            self._read_on()

    def fault(self, what: str, at: int) -> DataError:
        """The error of what stands at `at`."""
        line, column = self._place(at)
        return DataError(
            f"{self._path}:{line}", None, f"is not valid JSON ({what}, column {column})",
            "Write one array of objects; a file with one object per line ends in .jsonl.",
        )

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of what stands at `at`."""
        breaks = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) if breaks else self._column + at
        return self._line + breaks, column

    def _read_on(self) -> None:
        """Forget what lies behind `at`, and double what lies before it: long elements are not read again and again."""
        self._line, self._column = self._place(self.at)
        self.text, self.at = self.text[self.at :], 0
        content = self._file.read(max(_CHUNK, len(self.text)))
        self._ended = not content
        try:
            self.text += self._decoder.decode(content, final=self._ended)
        except UnicodeDecodeError as error:
            byte = self._bytes - len(error.object) + len(content) + error.start + 1
            raise DataError(str(self._path), None, f"is not UTF-8 (byte {byte})", "Save the file as UTF-8.") from error
        self._bytes += len(content)


def _object_or_fault(record: Any, where: str) -> dict[str, Any] | DataError:
    if isinstance(record, dict):
        return record
    return DataError(where, record, "is not a JSON object", 'Write {"prompt": …}.')


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise JsonFault(f"names {name[:100]!r} twice in one object")
    return found


def _whole_number(digits: str) -> int | Unusable:
    if len(digits) <= LONGEST_NUMBER:
        return int(digits)
    return Unusable(f"a number of {len(digits):,} digits, of which more than {LONGEST_NUMBER} are not read")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole_number)
