"""Whole commands as processes that are forked, not started: all three levels, a second each.

A command is `loradrop …` in a process of its own, with the real parent's code: owner, log, signals, exit code. What it
starts is forked, too: a launcher that, as DeepSpeed's, ends all ranks when one has failed, and the ranks. A search
starts a real process, with a training of milliseconds (`tune_stub`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.cli import main as command_line
from pipeline.distributed import launcher, ranks
from pipeline.files import read_json
from pipeline.stages import search as search_stage
from pipeline.stages.__main__ import main as stage_process

HELPERS = Path(__file__).parent
PATIENCE = float(os.environ.get("FAULTS_PATIENCE", "240"))
"""Seconds after which a command counts as hung: a machine may be busy."""
_REAPER = 36


def become_reaper() -> None:
    """Orphans below this process become its children: what a command leaves behind is seen."""
    ctypes.CDLL(None).prctl(_REAPER, 1, 0, 0, 0)


class Forked:
    """Stands in for `subprocess.Popen` in a command: forks what would be started."""

    def __init__(self, command: list[str], env: Mapping[str, str], **_: Any) -> None:
        ours, theirs = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                os.setsid()
                os.dup2(theirs, 1), os.dup2(theirs, 2)
                as_started(env)
                words = command[command.index("pipeline.stages") + 1 :]
                world = after(command, "--num_accelerators")
                port = after(command, "--master_port")
                code = stage_process(words) if world is None else launch(words, int(world), port)
            finally:
                leave(code)
        os.close(theirs)
        self.stdout = os.fdopen(ours, errors="replace")
        self._code: int | None = None

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def send_signal(self, number: int) -> None:
        """As Popen's."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def after(command: list[str], word: str) -> str | None:
    """The word behind `word`."""
    return command[command.index(word) + 1] if word in command else None


def as_started(env: Mapping[str, str]) -> None:
    """What exec does for a process: no files of the parent (and so no locks), no handlers, its own environment."""
    os.closerange(3, 4096)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)


def leave(code: int) -> None:
    """End a forked process, with what it has printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def launch(words: list[str], world: int, port: str | None) -> int:
    """What DeepSpeed's launcher does: start the ranks, end all when one has failed."""
    living: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if not pid:
            code = 99
            try:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                code = stage_process(words)
            finally:
                leave(code)
        living[pid] = rank
    first = 0
    while living:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        if living.pop(pid, None) is not None and code and not first:
            first = code
            for other in living:
                os.kill(other, signal.SIGTERM)
    return first % 256


def start_process(command: list[str], env: Mapping[str, str], **settings: Any) -> Any:
    """`Popen` of a command that a parent starts."""
    if "tune" not in command:
        return Forked(command, env, **settings)
    stub = [str(HELPERS / "tune_stub.py"), str(after(command, "--config")), str(after(command, "--folder"))]
    return subprocess.Popen([sys.executable, *stub], env=env, **settings)


class Command:
    """`loradrop WORDS` in a process of its own; `prepare` is done in it first, and inherited by what it starts."""

    def __init__(self, words: list[str], shown: Path, prepare: Callable[[], None] | None = None) -> None:
        self.shown, self._code = shown, -1000
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                os.setsid()
                out = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1), os.dup2(out, 2)
                as_started(dict(os.environ))
                if prepare is not None:
                    prepare()
                launcher.subprocess = Stand()  # type: ignore[attr-defined]
                search_stage.headline = lambda text: None
                code = command_line(words)
            finally:
                leave(code)

    def ended(self, patience: float = PATIENCE) -> int | None:
        """The exit code, negative for a signal; None: it hung, and was ended."""
        deadline = time.monotonic() + patience
        while self._code == -1000:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None
            time.sleep(0.01)
        return self._code

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        if self._code == -1000:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if done else -1000
        return self._code == -1000

    def said(self) -> str:
        """What it has printed."""
        return self.shown.read_text(errors="replace")

    def send(self, number: int) -> None:
        """A signal for the command alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Stand:
    """The module `subprocess`, as a command sees it here."""

    PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT
    Popen = staticmethod(start_process)


def victim(who: str, command: Command, folder: Path, chance: random.Random) -> int | None:
    """The pid of the command, of the launcher that it has started, or of one of its ranks; None where there is none."""
    if who == "command":
        return command.pid if command.running else None
    if who == "launcher":
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
            return int(children[0]) if children else None
        return None
    pids = []
    for path in sorted(ranks.ranks_folder(folder).glob("rank_*.json")):
        with contextlib.suppress(Exception):  # it leaves meanwhile
            pids.append(read_json(path)["pid"])
    return chance.choice(pids) if pids else None


def leftovers(seconds: float) -> list[str]:
    """Processes that outlive their command by so long; they are ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
        except ChildProcessError:
            return []
    found = []
    for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        found.append(f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()[:80]!r}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return found
