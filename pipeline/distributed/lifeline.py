"""What ties a process of a stage to those around it: signals that ask it to stop, its parent, its peers.

A thread does the watching, because the main thread may sit in a collective that never ends. Signals reach it through
the wake-up descriptor, which the interpreter writes to at once, whatever the main thread does.

- A signal (SIGINT, SIGTERM, the warning signal) or the run folder's stop request asks to stop. Before the work has
  begun there is nothing to save: the process leaves at once. Later the ranks agree at their next boundary. Where a peer
  has failed, the signal is the launcher's, which ends those that are left: they leave because of the failure.
- When the launcher, or the command that started it, is gone, or a peer has failed or was killed, the process leaves
  too, after `launch.grace_seconds` in which a save may end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.distributed import ranks
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, LoradropError
from pipeline.run_folder.paths import RunPaths, update_status

PARENT, WARNING, GRACE = "LORADROP_PARENT_PID", "LORADROP_WARNING_SIGNAL", "LORADROP_GRACE_SECONDS"
"""Environment variables in which the command tells the processes it starts on its machine what they have to know."""
_POLL_SECONDS = 0.3
_DEFAULT_GRACE = 10.0
_CLOCK_SKEW = 5.0
"""Seconds. Failures recorded on another machine that much before this process started are an earlier start's."""


def stop_signals(warning: str | None) -> list[signal.Signals]:
    """What asks a stage to stop."""
    return [signal.SIGINT, signal.SIGTERM, *([signal.Signals[warning]] if warning else [])]


def parent_is_gone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the command that started this process has ended; no where there is none."""
    command = int(environment.get(PARENT, 0))
    return bool(command) and not ranks.alive(command)


class Lifeline:
    """The watching thread of one process."""

    def __init__(
        self, stage: str, run_dir: Path, rank: int, in_world: bool, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._stage, self._run_dir, self._rank = stage, run_dir, rank
        self._paths = RunPaths(run_dir)
        self._grace = float(environment.get(GRACE, _DEFAULT_GRACE))
        self._signals = stop_signals(environment.get(WARNING) or "SIGUSR1")
        self._parents = [os.getppid(), int(environment.get(PARENT, 0))]
        self._since = time.time() - _CLOCK_SKEW
        self._in_world = in_world
        self._watches_peers = self._works = self._signalled = self._closed = False
        self._settling = threading.Lock()
        self._wake, self._wake_end = os.pipe()
        self._before: dict[signal.Signals, Any] = {}

    def stop_asked(self) -> bool:
        """Whether this process was told to stop."""
        return self._signalled or self._paths.stop_request.exists()

    def watch_peers(self) -> None:
        """All processes have started and registered: from now on their end is ours."""
        self._watches_peers = True

    def work_begins(self) -> None:
        """From now on there is something to lose: a stop waits for the next boundary."""
        self._works = True

    def open(self) -> None:
        """Take the signals over and start watching."""
        if self._in_world:
            ranks.register(self._run_dir, self._rank)
        os.set_blocking(self._wake_end, False)
        signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in self._signals}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)  # the command blocks them for the launcher
        threading.Thread(target=self._watch, daemon=True, name="lifeline").start()

    def settle(self) -> None:
        """How the process ends is decided: a stop, or the end of a peer, changes it no more."""
        with self._settling:
            self._closed = True

    def peer_stopped(self) -> bool:
        """Whether a peer has left during set-up, as it was asked to: a broken connection to it is no failure."""
        return self._in_world and not self._works and ranks.stopped(self._run_dir) and self._failed_peer() is None

    def close(self) -> None:
        """The process ends by itself."""
        self.settle()
        ranks.unregister(self._run_dir, self._rank)

    def give_signals_back(self) -> None:
        """Put the handlers back that were there before. Main thread only."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True

    def _watch(self) -> None:
        deadline: float | None = None
        while not self._closed:
            if self._signal_came(_POLL_SECONDS):
                self._signalled = True
            if self._closed:
                return
            if not self._works and self.stop_asked():
                with self._settling:
                    self._leave_set_up()
            reason = self._reason_to_leave()
            if reason is not None and deadline is None:
                deadline = time.monotonic() + self._grace
            if reason is not None and deadline is not None and (time.monotonic() >= deadline or not self._works):
                with self._settling:
                    self._leave(reason)

    def _signal_came(self, seconds: float) -> bool:
        if not select.select([self._wake], [], [], seconds)[0]:
            return False
        return any(number in self._signals for number in os.read(self._wake, 64))

    def _reason_to_leave(self) -> str | None:
        launcher, command = self._parents
        if os.getppid() != launcher or (command and not ranks.alive(command)):
            return "the process that started this one is gone"
        return self._failed_peer() if self._watches_peers else None

    def _failed_peer(self) -> str | None:
        """Which peer was the first to fail, and why."""
        ranks.record_lost(self._run_dir, but=self._rank)
        others = (f for f in ranks.failures(self._run_dir) if f.rank != self._rank)
        first = next((f for f in others if f.is_here or f.time >= self._since), None)
        return None if first is None else f"rank {first.rank} has failed: {first.message}"

    def _leave_set_up(self) -> None:
        if self._closed:
            return
        if self._in_world:
            if reason := self._failed_peer():
                self._leave(reason)
            ranks.record_stop(self._run_dir, self._rank)
        ranks.unregister(self._run_dir, self._rank)
        self.say_stopped()
        os._exit(EXIT_STOPPED)

    def say_stopped(self) -> None:
        """Record that the stage was stopped before its work began; the main process does."""
        if self._rank == 0:
            with contextlib.suppress(OSError, LoradropError):  # a full disk
                update_status(self._paths, self._stage, "stopped")
            _say(f"{self._stage} stopped; the same command continues")

    def _leave(self, reason: str) -> None:
        if self._closed:
            return
        message = f"rank {self._rank} left because {reason}"
        failure = ranks.Failure.of_this_process(self._rank, "crash", message, EXIT_FAILED)
        ranks.record_failure(self._run_dir, failure)
        ranks.unregister(self._run_dir, self._rank)
        _say(f"rank {self._rank} leaves: {reason}")
        os._exit(EXIT_FAILED)


_current: Lifeline | None = None


@contextmanager
def lifeline(stage: str, run_dir: Path, in_world: bool) -> Iterator[Lifeline]:
    """Watch while a stage's process works, alone or among others."""
    global _current
    _current = Lifeline(stage, run_dir, int(os.environ.get("RANK", "0")), in_world)
    _current.open()
    try:
        yield _current
    finally:
        _current.close()
        _current.give_signals_back()
        _current = None


def watch_peers() -> None:
    """See `Lifeline.watch_peers`. Without a lifeline, in a function call of the stage, nothing is watched."""
    if _current is not None:
        _current.watch_peers()


def work_begins() -> None:
    """See `Lifeline.work_begins`."""
    if _current is not None:
        _current.work_begins()


def stop_asked(paths: RunPaths | None = None) -> bool:
    """Whether a signal or the stage's stop request asks this process to stop, or a run folder's asks that run."""
    return (paths is not None and paths.stop_request.exists()) or (_current is not None and _current.stop_asked())


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the reader of our output may be gone
        print(text, file=sys.stderr, flush=True)
