"""Ctrl-C, SIGTERM and the end of the command that started it end a search in order: what has finished is kept, and
the same command continues.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from pipeline import EXIT_FAILED, EXIT_STOPPED, parent_is_gone
from tune.progress import tell

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.5


@dataclass
class Stopping:
    """Whether a stop was asked for. Plain, because Ray pickles what its callbacks hold."""

    requested: bool = False

    def listen(self) -> None:
        """Take the signals over (again: `ray.init` puts a SIGTERM handler of its own in place)."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def exit_code(self) -> int:
        """What a search that does not come to its end leaves with."""
        return EXIT_STOPPED if self.requested else EXIT_FAILED

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tell("Stopping: finished trials are kept (again to stop at once).")


@contextmanager
def stop_on_signal() -> Iterator[Stopping]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one interrupts at once. A killed command asks, too."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stopping = Stopping()
    stopping.listen()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            if parent_is_gone():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True, name="parent").start()
    try:
        yield stopping
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
