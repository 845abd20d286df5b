"""What people see while something works: a line, a progress line, how long it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from pipeline.errors import one_line, printable

__all__ = ["Progress", "duration", "one_line", "printable", "say"]


class Progress:
    """A bar of tqdm's, as wide as the terminal; elsewhere a line every `every_seconds`, which tqdm does not have."""

    def __init__(
        self, total: int, done: int, enabled: bool, unit: str = "step", stream: TextIO | None = None,
        every_seconds: float = 10.0,
    ) -> None:
        self.total, self._start_done, self._enabled, self._unit = total, done, enabled, unit
        self._stream = stream or sys.stderr
        self._start = time.monotonic()
        self._last = 0.0
        self._every = every_seconds
        self._bar: Any = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm  # here: what is said before anything is installed is said by this module, too

            self._bar = tqdm(
                total=total, initial=done, desc=f"{unit} {done}/{total}", file=self._stream, dynamic_ncols=True,
                bar_format="{desc}{bar}",
            )

    def show(self, done: int, parts: Iterable[str]) -> None:
        """Print `done/total`, the parts and the time left."""
        if not self._enabled:
            return
        now = time.monotonic()
        if self._bar is None and now - self._last < self._every and done < self.total:
            return
        self._last = now
        rate = (now - self._start) / max(done - self._start_done, 1)
        left = duration(rate * (self.total - done))
        text = one_line(" · ".join([f"{self._unit} {done}/{self.total}", *parts, f"{left} left"]))
        if self._bar is None:
            self._stream.write(f"{text}\n")
            self._stream.flush()
        else:
            self._bar.n = done
            self._bar.set_description_str(f"{text} ")

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()


def say(text: str, enabled: bool = True, stream: TextIO | None = None) -> None:
    """One line for the user, seen at once also through a pipe; on stderr, because stdout belongs to results."""
    if enabled:
        print(printable(text), file=stream or sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """40 s, 3 min, 1 h 20 min; 0 s only where there is nothing."""
    if seconds < 90:
        return f"{max(1, round(seconds)) if seconds else 0} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
