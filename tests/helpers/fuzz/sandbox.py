"""One case in a forked child, and what is wrong with how it ended."""

from __future__ import annotations

import hashlib
import io
import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from helpers.fuzz.case import Case, arguments, lay_out

DEADLINE_S = 5
MOST_MEMORY = 16 * 2**30
"""Address space; torch alone reserves some GiB."""
HASHED_BYTES = 2**20
NOT_BEGUN, LEFT_RUNNING = 99, 98
"""Exit codes of a child that got no further, and of one that left processes."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SENTENCE = re.compile(r"^loradrop: .{10,}", re.MULTILINE)


@dataclass(frozen=True)
class Ended:
    """How a case ended."""

    outcome: str
    """refused and accepted are right; traceback, hang, leftover, control, silent, code are not."""
    detail: str
    output: str

    @property
    def wrong(self) -> bool:
        """Whether the case has failed."""
        return self.outcome not in ("refused", "accepted")


def run_case(case: Case, work: Path, base: Path) -> Ended:
    """Lay the case out in a folder of its own, run it, look at what it said and left, remove the folder."""
    here, said = work / "case", work / "said"
    here.mkdir()
    said.mkdir()
    try:
        for folder in ("home", "tmp"):
            (here / folder).mkdir()
        lay_out(case, here, base)
        before = _snapshot(here)
        code = _run(case, here, said, base)
        output = "".join((said / name).read_bytes().decode("utf-8", "backslashreplace") for name in ("out", "err"))
        changed = sorted(path for path in _differences(before, _snapshot(here)) if not path.startswith(case.may_change))
        outcome, detail = _judge(case, code, output, changed)
        return Ended(outcome, detail, output)
    finally:
        for path in (here, said):
            _remove(path)


def _judge(case: Case, code: int | None, output: str, changed: list[str]) -> tuple[str, str]:
    if code is None:
        return "hang", f"still at work after {DEADLINE_S} s"
    if "Traceback (most recent call last)" in output:
        return "traceback", output.strip().splitlines()[-1][:200]
    if code == LEFT_RUNNING:
        return "leftover", "a process"
    if code not in (0, 2) and not (code == 1 and "verify" in case.argv):  # which says so of what is damaged
        return "code", f"ended with {code}"
    if control := _CONTROL.search(output):
        return "control", repr(output[max(0, control.start() - 40) : control.end() + 20])
    if changed:
        return "leftover", ", ".join(changed)[:300]
    if code in (0, 1):
        return "accepted", ""
    if not _SENTENCE.search(output):
        return "silent", repr(output[:200])
    return "refused", ""


def _run(case: Case, here: Path, said: Path, base: Path) -> int | None:
    """The exit code; below 0 a signal, None where it was ended at the deadline. What it started is ended with it."""
    child = os.fork()
    if child == 0:
        _work(case, here, said, base)
    waiting = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([waiting], [], [], DEADLINE_S)
        if not ready:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = _ended_group(child)
        return None if not ready or status == -signal.SIGXCPU else LEFT_RUNNING if left else status
    finally:
        os.close(waiting)


def _ended_group(child: int) -> bool:
    """Whether processes of the case's group were left; they are ended."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _work(case: Case, here: Path, said: Path, base: Path) -> NoReturn:
    """The child: no terminal, no network, no other program, bounded time and memory."""
    code = NOT_BEGUN
    try:
        os.setsid()
        for number, path in ((0, "/dev/null"), (1, said / "out"), (2, said / "err")):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT
            os.dup2(os.open(path, flags, 0o600), number)
        sys.stdin = io.TextIOWrapper(io.FileIO(0))
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), "utf-8", "backslashreplace", write_through=True)
        resource.setrlimit(resource.RLIMIT_CPU, (DEADLINE_S, DEADLINE_S + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(here)
        os.environ.update(HOME=str(here / "home"), XDG_CACHE_HOME=str(here / "home/.cache"), TMPDIR=str(here / "tmp"))
        socket.socket.connect = _refuse  # type: ignore[assignment, method-assign]
        subprocess.Popen.__init__ = _refuse  # type: ignore[assignment, method-assign]
        code = _call(case, arguments(case, here, base))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _call(case: Case, argv: list[str]) -> int:
    if case.entry == "main":
        from pipeline.cli import main

        return main(argv)
    from pipeline.errors import LoradropError
    from pipeline.report.inputs import read_inputs

    try:
        read_inputs(Path(argv[0]))
    except LoradropError as error:
        print(f"loradrop: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _refuse(*_: object, **__: object) -> NoReturn:
    raise OSError("the case may reach no network and start no program")


def _snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Path -> what is there."""
    found: dict[str, tuple[object, ...]] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            entry = os.lstat(path)
            content: object = None
            if stat.S_ISREG(entry.st_mode) and entry.st_size <= HASHED_BYTES:
                with open(path, "rb") as file:
                    content = hashlib.blake2b(file.read()).digest()
            elif stat.S_ISLNK(entry.st_mode):
                content = os.readlink(path)
            size = None if stat.S_ISDIR(entry.st_mode) else entry.st_size
            found[os.path.relpath(path, folder)] = (entry.st_mode, size, content)
    return found


def _differences(before: dict[str, tuple[object, ...]], after: dict[str, tuple[object, ...]]) -> set[str]:
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def _remove(folder: Path) -> None:
    for root, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(path := os.path.join(root, name)):
                os.chmod(path, 0o700)
    shutil.rmtree(folder)
