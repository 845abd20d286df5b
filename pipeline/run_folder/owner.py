"""A folder has one owner at a time: the command that works in it, from its first file to its last.

    RUN/.owner          held by the command (node 0); says who it is
    RUN/.owner.node1    by the command of another node of the same job

A lock (flock) says whether the owner lives; the kernel gives it back with the process, however that ends, and a stopped
process (SIGSTOP) keeps it. Where a file system does not carry locks from one machine to another, the file's time says
it: the owner touches it every `BEAT` seconds, and it counts as gone `EXPIRES` seconds after the last time, by the clock
of the file system. A machine's own clock decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import EXIT_FAILED, RunFolderError, one_line
from pipeline.files import full_disk_named

OWNER = ".owner"
"""Name of the file; those of further nodes begin with it."""
BEAT = 5.0
"""Seconds between two touches."""
EXPIRES = 60.0
"""Seconds without a touch after which an owner on another machine counts as gone."""
PATIENCE = 1.0
"""Seconds: who only looks whether a file is held, or has yet to write its name into it, is not an owner."""
_held: set[Path] = set()
"""What this process owns: the stages that a command starts do not lock against it."""


@dataclass(frozen=True)
class Owner:
    """Who has a folder."""

    pid: int
    host: str
    kernel: str
    """Boot of the machine: within one, the lock decides."""
    command: str
    since: str
    """When it started, for people."""
    job: str = ""
    """What the commands of the nodes of one job have in common; empty: a command on its own."""


@contextmanager
def owned(folder: Path, command: str, node: int = 0, job: str = "") -> Iterator[None]:
    """Own `folder`, which is made where it does not exist; at no cost where this process owns it already.

    Args:
        command: what works here, for whoever comes second.
        node, job: which node of which job this is, where several share a folder.

    Raises:
        RunFolderError: another command has it; nothing in it has been touched. Or it cannot be written to.
    """
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    made = not os.path.lexists(folder)
    name = f"{OWNER}.node{node}" if node else OWNER
    try:
        with held(folder / name, command, job):
            _refuse_others(folder, name, job)
            _held.add(folder)
            try:
                yield
            finally:
                _held.discard(folder)
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing has been written


@contextmanager
def held(path: Path, command: str, job: str = "", patience: float | None = None) -> Iterator[None]:
    """Hold one file; it is removed at the end.

    Args:
        patience: seconds to wait for whoever has it; None: PATIENCE.

    Raises:
        RunFolderError: somebody has it, or it is no file that can be held.
    """
    owner = Owner(os.getpid(), socket.gethostname(), _kernel(), command, time.strftime("%Y-%m-%d %H:%M:%S"), job)
    descriptor = _lock(path, PATIENCE if patience is None else patience)
    ended = threading.Event()
    try:
        with contextlib.suppress(OSError):  # a full disk: an owner without a name
            text = json.dumps(asdict(owner)).encode()
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
        beating = threading.Thread(target=_beat, args=(path, descriptor, owner, ended), daemon=True, name="owner")
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            with contextlib.suppress(OSError):
                path.unlink()  # before the lock goes: who waits for it sees that this is no longer the file
    finally:
        os.close(descriptor)


def _lock(path: Path, patience: float) -> int:
    """A descriptor of the locked file."""
    deadline = time.monotonic() + patience
    while True:
        descriptor, other = _open(path), read_owner(path)
        try:
            free = _try_lock(descriptor, fcntl.LOCK_EX)
            if free is not False and _is_at(path, descriptor):  # else its owner has removed it meanwhile
                if other is not None and _lives_elsewhere(other, free, path):
                    raise _in_use(path, other)
                return descriptor
            if free is False and time.monotonic() > deadline:
                raise _in_use(path, other)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.05)


def _open(path: Path) -> int:
    try:
        with full_disk_named(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else f"cannot be written ({error.strerror})"
        raise RunFolderError(str(path), None, what, "Give a --run-dir that this user can write to.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunFolderError(str(path), None, "is no ordinary file", "Remove it, or give another --run-dir.")
    return descriptor


def _try_lock(descriptor: int, kind: int) -> bool | None:
    """Whether it is locked now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lives_elsewhere(other: Owner, free: bool | None, path: Path) -> bool:
    """Whether the owner that a file names lives, although the file is not locked: where locks do not reach us."""
    if free and other.kernel == _kernel():
        return False
    before = path.stat().st_mtime
    with tempfile.TemporaryFile(dir=path.parent) as now:
        age = os.fstat(now.fileno()).st_mtime - before
    if abs(age) < EXPIRES:
        return True
    time.sleep(2 * BEAT)  # the clock may have been set since the last touch
    return path.stat().st_mtime != before


def _refuse_others(folder: Path, own: str, job: str) -> None:
    """Refuse where another command has the folder under another node's number."""
    for path in sorted(folder.glob(f"{OWNER}*")):
        if path.name == own or not (path.name == OWNER or path.name.startswith(f"{OWNER}.node")):
            continue
        with contextlib.suppress(OSError):  # it leaves meanwhile
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            free = _try_lock(descriptor, fcntl.LOCK_SH)
            os.close(descriptor)  # and what was locked for a look is free again
            other = read_owner(path)
            if job and other is not None and other.job == job:
                continue
            if free is False or (other is not None and _lives_elsewhere(other, free, path)):
                raise _in_use(path, other)


def _beat(path: Path, descriptor: int, owner: Owner, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        now = read_owner(path)
        if now is not None and now != owner:  # we were stopped for so long that another machine took us for dead
            print(f"\n{path.parent}: {_described(now)} has it now; leaving at once", file=sys.stderr, flush=True)
            os._exit(EXIT_FAILED)
        with contextlib.suppress(OSError):
            os.utime(descriptor)  # the time is the file system's


def read_owner(path: Path) -> Owner | None:
    """What a file says; None where it says nothing that can be understood."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            said = json.loads(file.read(65536))
            return Owner(int(said["pid"]), *(str(said[name]) for name in ("host", "kernel", "command", "since", "job")))
    return None


def _in_use(path: Path, owner: Owner | None) -> RunFolderError:
    remedy = "Wait until it ends, end it, or give another --run-dir."
    if owner is not None and owner.kernel != _kernel():
        remedy += f" If that machine is gone, the folder is free {EXPIRES:.0f} s after its last sign of life."
    who = "another command" if owner is None else _described(owner)
    return RunFolderError("--run-dir", str(path.parent), f"is in use: {who} has it", remedy)


def _described(owner: Owner) -> str:
    command, host, since = map(one_line, (owner.command, owner.host, owner.since))
    return f"{command} (pid {owner.pid} on {host}, since {since})"


def _is_at(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    return False


def _kernel() -> str:
    """What processes that see each other's locks have in common."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()
