"""Which processes of a stage live, and which of them failed first: one small file each, in logs/ranks/ of the run.

    rank_1.json       written when the process starts, removed when it leaves in order
    failure_1.json    why it failed, by itself or, where it was killed, by those who outlive it
    stopped_1.json    it left during set-up, because a stop was asked for

A process that is registered, dead and silent was killed from outside: kill -9, the kernel's out-of-memory killer.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pipeline.distributed.nodes import NODE_RANK_VARIABLES
from pipeline.errors import EXIT_FAILED, DiskFull, RunFolderError
from pipeline.files import read_json, write_json

Kind = Literal["killed", "error", "crash"]
LEAVING_SECONDS = 5.0
"""Beyond the time of grace: processes of a killed command, on a busy machine, until they are gone."""


@dataclass(frozen=True)
class Registered:
    """A process that works in the run folder."""

    rank: int
    pid: int
    host: str
    """Machine, process namespace and node: elsewhere the pid means nothing."""
    started: int
    """Start of the process in kernel ticks since boot: a pid that was given again is another process. 0: unknown."""


@dataclass(frozen=True)
class Failure:
    """Why a process ended."""

    rank: int
    pid: int
    kind: Kind
    """`killed`: from outside, without a word. `error`: raised on purpose, with a message for the user. `crash`: any
    other exception."""
    message: str
    exit_code: int
    host: str
    time: float
    """Seconds since 1970."""

    @property
    def is_here(self) -> bool:
        """Whether it happened on this machine and node, whose earlier failures each start forgets."""
        return self.host == _host()

    @classmethod
    def of_this_process(cls, rank: int, kind: Kind, message: str, exit_code: int) -> Failure:
        """A failure that happens here and now."""
        return cls(rank, os.getpid(), kind, message, exit_code, _host(), time.time())


def ranks_folder(run_dir: Path) -> Path:
    """Where the files lie."""
    return run_dir / "logs" / "ranks"


def register(run_dir: Path, rank: int) -> None:
    """Say that this process works here, and forget what an earlier one of its rank left.

    Raises:
        RunFolderError: an earlier one still works here.
    """
    _refuse_living(run_dir, [entry for entry in _registered(run_dir) if entry.rank == rank])
    for path in (_failure_file(run_dir, rank), _stop_file(run_dir, rank)):
        path.unlink(missing_ok=True)
    entry = Registered(rank, os.getpid(), _host(), _start_of(os.getpid()) or 0)
    write_json(_rank_file(run_dir, rank), asdict(entry))


def unregister(run_dir: Path, rank: int) -> None:
    """This process leaves in order, or has said why it failed."""
    with contextlib.suppress(OSError):
        _rank_file(run_dir, rank).unlink()


def record_failure(run_dir: Path, failure: Failure) -> None:
    """Publish a failure; the first word about a rank stands. Never raises for want of disk space: it comes last."""
    path = _failure_file(run_dir, failure.rank)
    with contextlib.suppress(OSError, DiskFull):
        if not path.exists():
            write_json(path, asdict(failure))


def record_stop(run_dir: Path, rank: int) -> None:
    """Say that this process leaves because it was asked to: what that breaks for its peers is no failure of theirs."""
    with contextlib.suppress(OSError, DiskFull):
        write_json(_stop_file(run_dir, rank), {"host": _host()})


def stopped(run_dir: Path) -> bool:
    """Whether a process has left because it was asked to."""
    return any(ranks_folder(run_dir).glob("stopped_*.json"))


def failures(run_dir: Path) -> list[Failure]:
    """What is known, the cause before its consequences: killed processes first, then in order of time."""
    found = []
    for path in ranks_folder(run_dir).glob("failure_*.json"):
        with contextlib.suppress(RunFolderError, TypeError):
            found.append(Failure(**read_json(path)))
    return sorted(found, key=lambda failure: (failure.kind != "killed", failure.time))


def lost(run_dir: Path, but: int | None = None) -> list[Registered]:
    """Processes of this machine that are registered, dead, and have said nothing; `but` is a rank to pass over."""
    return [
        entry
        for entry in _registered(run_dir)
        if entry.rank != but
        and entry.host == _host()
        and not _lives(entry)
        and not _failure_file(run_dir, entry.rank).exists()
        and _rank_file(run_dir, entry.rank).exists()  # looked at last: it may have left in order meanwhile
    ]


def record_lost(run_dir: Path, but: int | None = None) -> list[Failure]:
    """Write the failure of every lost process on its behalf; returns them."""
    said = []
    for entry in lost(run_dir, but):
        message = (
            f"rank {entry.rank} (pid {entry.pid}) was killed from outside and could say nothing: kill -9, or the"
            " kernel for want of memory (see dmesg; lower train.micro_batch or data.max_tokens)"
        )
        said.append(Failure(entry.rank, entry.pid, "killed", message, EXIT_FAILED, entry.host, time.time()))
        record_failure(run_dir, said[-1])
    return said


def clear(run_dir: Path) -> None:
    """Forget what an earlier start of a stage left on this machine.

    Raises:
        RunFolderError: one of its processes still works in the folder.
    """
    entries = [entry for entry in _registered(run_dir) if entry.host == _host()]
    _refuse_living(run_dir, entries)
    ours = {entry.rank for entry in entries} | {f.rank for f in failures(run_dir) if f.host == _host()}
    for rank in ours:
        _rank_file(run_dir, rank).unlink(missing_ok=True)
        _failure_file(run_dir, rank).unlink(missing_ok=True)
    for path in ranks_folder(run_dir).glob("stopped_*.json"):
        with contextlib.suppress(RunFolderError, TypeError, KeyError):
            if read_json(path)["host"] == _host():
                path.unlink(missing_ok=True)


def wait_for_orphans(run_dir: Path, seconds: float) -> None:
    """Wait for processes whose command was killed: they leave by themselves once they have noticed (lifeline)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(e.host == _host() and _lives(e) for e in _registered(run_dir)):
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process of this machine exists and is no zombie."""
    return _start_of(pid) is not None


def _refuse_living(run_dir: Path, entries: list[Registered]) -> None:
    for entry in entries:
        if entry.host == _host() and entry.pid != os.getpid() and _lives(entry):
            raise RunFolderError(
                "--run-dir",
                str(run_dir),
                f"is in use by process {entry.pid}",
                "Wait until it ends, end it, or give another --run-dir.",
            )


def _registered(run_dir: Path) -> Iterator[Registered]:
    for path in ranks_folder(run_dir).glob("rank_*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # removed or cut off meanwhile
            yield Registered(**json.loads(path.read_text(encoding="utf-8")))


def _lives(entry: Registered) -> bool:
    started = _start_of(entry.pid)
    return started is not None and (not entry.started or started in (0, entry.started))


def _start_of(pid: int) -> int | None:
    """Start of a living process in ticks since boot, 0 where the system does not say; None: dead, or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return 0
        return None
    state, *rest = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else int(rest[18])


def _host() -> str:
    """Machine, process namespace and node: several nodes of a run may be one machine (two terminals, containers)."""
    node = next((os.environ[name] for name in NODE_RANK_VARIABLES if os.environ.get(name)), "0")
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')} node {node}"
    return f"{socket.gethostname()} node {node}"


def _rank_file(run_dir: Path, rank: int) -> Path:
    return ranks_folder(run_dir) / f"rank_{rank}.json"


def _stop_file(run_dir: Path, rank: int) -> Path:
    return ranks_folder(run_dir) / f"stopped_{rank}.json"


def _failure_file(run_dir: Path, rank: int) -> Path:
    return ranks_folder(run_dir) / f"failure_{rank}.json"
