"""Making `.venv`: look first, say what happens, leave nothing that a second try stumbles over.

An installation can be interrupted at any point and repeated: an environment without its marker is made anew (pip's
cache keeps the downloads), because one that was cut off inside a package looks whole to pip. Only one installation
runs at a time: the lock is an open file that pip inherits, so that even a pip whose parent was killed holds it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from pipeline.errors import SetupError, StageFailed, UserError, joined, one_line
from pipeline.setup.venv import Environment

GIGABYTE = 10**9
NEEDED_BYTES = 4 * GIGABYTE
"""An environment with torch's CPU build takes 2.4 GB, and unpacking needs room beside it."""
NEEDED_BYTES_CUDA = 12 * GIGABYTE
"""With torch's CUDA build it takes about 8 GB."""
HEARTBEAT_SECONDS = 30.0
"""Between two lines of progress where the output is no terminal."""
PIP_STEPS = ("Collecting", "Downloading", "Building", "Installing")
"""Lines of pip's output that say what it is at."""
DEBIAN_PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"


def prepare(environment: Environment, test_tools: bool = False) -> None:
    """Make the environment, or bring it up to date; alone among concurrent launches.

    Args:
        test_tools: add what only the project's own tests need. Once there, it is kept up to date with the rest.

    Raises:
        SetupError: the machine lacks something (an `ErrorList` where several things are missing).
        StageFailed: venv or pip failed for another reason; carries the end of the log.
        KeyboardInterrupt: also on SIGTERM; the running step has ended by then.
    """
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with installation_lock(environment) as lock:
        if not environment.is_ready(test_tools):  # another launch may have finished while this one waited
            same_place = environment.recorded().get("place") == environment.fingerprint()["place"]
            if not (same_place and environment.python.exists()):
                _refuse_anothers(environment)
                _empty(environment.folder)  # before looking for free space, which this may give
            check_machine(environment)
            _install(environment, lock, test_tools)
    signal.signal(signal.SIGTERM, previous)


def check_machine(environment: Environment) -> None:
    """Look for everything an installation needs before it starts. Raises `SetupError` or `ErrorList`."""
    found = [venv_fault()]
    if shutil.which("nvidia-smi"):
        found += [compiler_fault(), headers_fault()]
    if not environment.python.exists():
        found.append(disk_fault(environment.folder if environment.folder.exists() else environment.root))
    faults: list[UserError] = [fault for fault in found if fault]
    if faults:
        raise joined(faults)


def venv_fault() -> SetupError | None:
    """Debian ships Python without the modules that make environments."""
    missing = [name for name in ("venv", "ensurepip") if find_spec(name) is None]
    if not missing:
        return None
    remedy = f"Debian, Ubuntu: apt install {DEBIAN_PYTHON}-venv. Elsewhere: install a complete Python."
    return SetupError("Python module", missing[0], "is missing, so no environment can be made", remedy)


def compiler_fault() -> SetupError | None:
    """With CUDA, kernels are compiled at first use; without, nothing is."""
    names = ("c++", "g++", "clang++")
    if any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", *names)):
        return None
    remedy = "Debian, Ubuntu: apt install g++. Elsewhere: install one, or name it in CXX."
    return SetupError("C++ compiler", None, f"none of {', '.join(names)} found; CUDA kernels need one", remedy)


def headers_fault() -> SetupError | None:
    """The same kernels include Python.h."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        return None
    remedy = f"Debian, Ubuntu: apt install {DEBIAN_PYTHON}-dev. Elsewhere: install a complete Python."
    return SetupError("Python headers", str(header), "is missing, and CUDA kernels compile against it", remedy)


def disk_fault(place: Path) -> SetupError | None:
    """Running out of space in the middle is the least clear of all errors."""
    needed = NEEDED_BYTES_CUDA if shutil.which("nvidia-smi") else NEEDED_BYTES
    free = shutil.disk_usage(place).free
    if free >= needed:
        return None
    remedy = "Free some, or clone the repository to a larger disk."
    constraint = f"{free / GIGABYTE:.1f} GB, but the installation needs about {needed // GIGABYTE} GB"
    return SetupError(f"free disk space at {place}", None, constraint, remedy)


@contextmanager
def installation_lock(environment: Environment) -> Iterator[IO[bytes]]:
    """Hold the only right to change the environment. Yields the locked file, to be inherited by what changes it.

    The file is pyproject.toml: it is always there, and nothing has to be left behind. Opened for writing because
    network file systems ask that of an exclusive lock.
    """
    try:
        file = (environment.root / "pyproject.toml").open("r+b")
    except OSError as error:
        remedy = "Clone the repository to a folder of your own."
        raise SetupError(str(error.filename), None, f"cannot be written ({error.strerror})", remedy) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("loradrop: another launch is preparing .venv; waiting for it.", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _install(environment: Environment, lock: IO[bytes], test_tools: bool) -> None:
    folder, progress = environment.folder, Elapsed()
    adding = test_tools and environment.is_ready()
    test_tools = test_tools or environment.has_test_tools()
    environment.marker.unlink(missing_ok=True)  # from here to the end, it is incomplete
    if adding:
        print("loradrop: adding the test tools to .venv, once (about 150 MB).", file=sys.stderr)
    elif environment.python.exists():
        print("loradrop: pyproject.toml or constraints.txt changed; bringing .venv up to date.", file=sys.stderr)
    else:
        print("loradrop: making .venv, once (2.4 GB with torch's CPU build, about 8 GB with CUDA).", file=sys.stderr)
        progress.say(f"environment of Python {sys.version.split()[0]} in {folder}")
        # The interpreter behind the running one, which may itself have lived in .venv.
        python = getattr(sys, "_base_executable", sys.executable)
        run_step([python, "-I", "-m", "venv", str(folder)], folder, lock, progress)
    progress.say(f"packages pinned in constraints.txt (log: {_log(folder)})")
    pip = [str(environment.python), "-I", "-m", "pip", "--no-input", "--disable-pip-version-check", "install"]
    project = ".[test]" if test_tools else "."
    run_step([*pip, "--progress-bar", "off", "-c", "constraints.txt", "-e", project], folder, lock, progress)
    shutil.rmtree(folder / "tmp")
    environment.mark_complete(test_tools)
    progress.say("ready")


def _refuse_anothers(environment: Environment) -> None:
    """Raises `SetupError` where .venv is, by a link, that of another checkout, which would lose it."""
    place = environment.recorded().get("place")
    other = Path(str(place[0])) if isinstance(place, list) and place else environment.root
    theirs = other / environment.folder.name
    if other != environment.root and theirs.exists() and theirs.samefile(environment.folder):
        remedy = "Remove the link: this checkout then makes one of its own."
        raise SetupError(str(environment.folder), None, f"is a link to the environment of {other}", remedy)


def _empty(folder: Path) -> None:
    """Contents only: the folder itself may be a link to a larger disk.

    The log goes last: it tells, also after an interruption here, that the rest is ours to remove.
    """
    contents = sorted(folder.iterdir(), key=lambda path: path == _log(folder)) if folder.exists() else []
    if contents and contents[-1] != _log(folder):
        remedy = "Rename it, or remove it, and repeat."
        raise SetupError(str(folder), None, "is needed, but holds something that launch.sh did not make", remedy)
    for path in contents:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def run_step(command: list[str], folder: Path, lock: IO[bytes], progress: Elapsed) -> None:
    """Run one step beside `folder`, output into its install.log, showing the log's last line.

    The step has a process group of its own, so that an interruption ends all of it, builds included, and temporary
    files inside `folder`, so that making it anew leaves nothing behind.

    Raises:
        StageFailed: the step failed. `SetupError` where the reason is a full disk.
    """
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    variables.update(PYTHONUNBUFFERED="1", TMPDIR=str(folder / "tmp"), DS_BUILD_OPS="0")  # kernels: at first use
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    with _log(folder).open("ab") as log:
        child = subprocess.Popen(
            command,
            cwd=folder.parent,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=(lock.fileno(),),
        )
        try:
            while _still_running(child):
                steps = [line.strip() for line in _log_tail(folder, 40) if line.strip().startswith(PIP_STEPS)]
                progress.update(steps[-1] if steps else "working")
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
    if child.returncode != 0:
        raise _failure(folder, child.returncode)


def _still_running(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return True
    return False


def _failure(folder: Path, code: int) -> SetupError | StageFailed:
    tail = _log_tail(folder, 12)
    if any("No space left on device" in line for line in tail):
        return SetupError("free disk space", None, f"ran out while installing to {folder}", "Free some.")
    return StageFailed(
        "\n    ".join([f"the set-up failed (exit code {code}). The end of {_log(folder)}:", *tail])
        + "\nOnce mended (network? package index?), the same command starts the set-up again."
    )


def _log(folder: Path) -> Path:
    return folder / "install.log"


def _log_tail(folder: Path, lines: int) -> list[str]:
    with _log(folder).open("rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - 8192))
        return log.read().decode("utf-8", "replace").splitlines()[-lines:]


class Elapsed:
    """Elapsed seconds and what is happening, on stderr: one rewritten line on a terminal, else one now and then."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._clear = "\r\033[K" if sys.stderr.isatty() else ""

    def say(self, text: str) -> None:
        """A line that stays."""
        self._last = time.monotonic()
        print(f"{self._clear}{self._line(text)}", file=sys.stderr, flush=True)

    def update(self, text: str) -> None:
        """What goes on at the moment."""
        if self._clear:
            print(f"{self._clear}{self._line(text[:80])}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last >= HEARTBEAT_SECONDS:
            self.say(text[:80])

    def _line(self, text: str) -> str:
        return f"  [{time.monotonic() - self._start:4.0f} s] {one_line(text)}"
