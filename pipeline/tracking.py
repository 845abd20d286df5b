"""What a run says while it works: metrics.jsonl always, one progress line on the main process."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from pipeline.loggers import Logger
from pipeline.runs import full_disk_named, read_json_lines, write_text


class Metrics:
    """Append-only JSON lines, flushed row by row, and whatever else listens. Silent on all but the main process."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self._path, self._enabled = path, enabled
        self._loggers: list[Logger] = []

    def send_to(self, loggers: Iterable[Logger]) -> None:
        """Pass the numbers of every further row on to these."""
        self._loggers.extend(loggers)

    def close(self) -> None:
        """End what was opened beside the JSON lines."""
        while self._loggers:
            self._loggers.pop().close()

    def keep_until(self, step: int, validated: bool) -> None:
        """After a resume: forget rows of steps that are done again, and of the last validation if that is."""
        if self._enabled and self._path.exists():
            rows = [row for row in read_json_lines(self._path) if row.get("step", 0) <= step]
            if not validated:
                rows = [row for row in rows if row["kind"] != "validation" or row.get("step") != step]
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, kind: str, **values: Any) -> None:
        """Append one row, whole or not at all. Raises `DiskFull`."""
        if not self._enabled:
            return
        with full_disk_named(self._path.parent), self._path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            row = (json.dumps({"kind": kind, **values}) + "\n").encode()
            try:
                if file.write(row) != len(row):
                    raise OSError(errno.ENOSPC, "part of a row written")
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        step = int(numbers.pop("step", 0))
        for logger in self._loggers:
            logger.write(kind, step, numbers)

    def sync(self) -> None:
        """Rows up to here survive a crash of the machine."""
        if self._enabled and self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())


class Progress:
    """One line that rewrites itself on a terminal; elsewhere a line every `every_seconds`."""

    def __init__(
        self, total: int, done: int, enabled: bool, unit: str = "step", stream: TextIO | None = None,
        every_seconds: float = 10.0,
    ) -> None:
        self._total, self._start_done, self._enabled, self._unit = total, done, enabled, unit
        self._stream = stream or sys.stderr
        self._start = time.monotonic()
        self._last = 0.0
        self._every = every_seconds

    def show(self, done: int, parts: Iterable[str]) -> None:
        """Print `done/total`, the parts and the time left."""
        if not self._enabled:
            return
        now = time.monotonic()
        terminal = self._stream.isatty()
        if not terminal and now - self._last < self._every and done < self._total:
            return
        self._last = now
        rate = (now - self._start) / max(done - self._start_done, 1)
        left = format_seconds(rate * (self._total - done))
        text = " · ".join([f"{self._unit} {done}/{self._total}", *parts, f"{left} left"])
        self._stream.write(f"\r\033[K{text}" if terminal else f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line."""
        if self._enabled and self._stream.isatty():
            self._stream.write("\n")


def say(text: str, enabled: bool = True) -> None:
    """One line for the user, on stderr: stdout belongs to results."""
    if enabled:
        print(text, file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """12 s, 3 min 20 s, 1 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
