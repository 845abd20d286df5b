"""What a run says while it works: metrics.jsonl always, one progress line on the main process."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TextIO


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
