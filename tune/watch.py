"""Ray dies: the search says so and ends at once. By itself it would wait for minutes, deaf to Ctrl-C."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil

from pipeline import alive
from tune.progress import tell

POLL_SECONDS = 0.5
SCAN_SECONDS = 5.0
"""How often the descendants are listed, which costs a look at every process of the machine."""
SHUTDOWN_SECONDS = 20.0
"""Time for Ray to end in order."""
KILL_SECONDS = 5.0
TOKEN = "RAY_AUTH_TOKEN"


class RayWatch:
    """A thread that ends this process when Ray cannot: the main thread may sit in a call that never returns.

    The ledger is on disk line by line, so nothing is lost by leaving at any moment.
    """

    def __init__(self, processes: Mapping[str, int], leftovers: tuple[Path, ...], exit_code: Callable[[], int]) -> None:
        """
        Args:
            processes: Pids of those of Ray's processes without which nothing goes on, by name.
            leftovers: Folders that are removed on leaving.
            exit_code: What to leave with.
        """
        self._processes, self._leftovers, self._exit_code = dict(processes), leftovers, exit_code
        self._descendants: set[psutil.Process] = set()
        self._deadline: float | None = None
        self._over, self._leaving = threading.Event(), threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """From now on; after the block Ray has `SHUTDOWN_SECONDS` until `end`."""
        threading.Thread(target=self._watch, daemon=True, name="ray-watch").start()
        try:
            yield
        except Exception:
            if dead := self._dead():  # what Ray makes of it is no news
                self._leave(dead)
            raise
        finally:
            self._deadline = time.monotonic() + SHUTDOWN_SECONDS

    def end(self) -> None:
        """Ray has ended."""
        self._over.set()

    def _watch(self) -> None:
        scanned = float("-inf")
        while not self._over.wait(POLL_SECONDS):
            if time.monotonic() - scanned > SCAN_SECONDS:
                self._scan()
                scanned = time.monotonic()
            if self._deadline is None and (dead := self._dead()):
                self._leave(dead)
            elif self._deadline is not None and time.monotonic() > self._deadline:
                self._leave("Ray does not end")

    def _dead(self) -> str:
        dead = [f"{name} (pid {pid})" for name, pid in self._processes.items() if not alive(pid)]
        return f"Ray's {' and '.join(dead)} died (killed, or for want of memory?)" if dead else ""

    def _scan(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._descendants |= set(psutil.Process().children(recursive=True))

    def _leave(self, reason: str) -> NoReturn:
        self._leaving.acquire()  # for good: whoever comes second waits here for the end
        self._scan()
        _end(self._descendants | set(_bearers(token_sha256())))
        for folder in self._leftovers:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError, ValueError):  # the reader of our output may be gone
            tell(f"Search ended: {reason}. Finished trials are kept; the same command continues.")
        os._exit(self._exit_code())


def token_sha256(environment: Mapping[str, str] = os.environ) -> str:
    """The hash by which a search's processes are known; empty where there is no token."""
    token = environment.get(TOKEN, "")
    return hashlib.sha256(token.encode()).hexdigest() if token else ""


def end_bearers(sha256: str) -> None:
    """End what a killed search has left running."""
    _end(set(_bearers(sha256)))


def _bearers(sha256: str) -> Iterator[psutil.Process]:
    """Processes of a search's Ray, also those whose parent has died: nobody else has its token."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if sha256 and process.pid != os.getpid() and token_sha256(process.environ()) == sha256:
                yield process


def _end(processes: Set[psutil.Process]) -> None:
    for process in processes:  # psutil knows a pid that was given again
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, KILL_SECONDS)
