"""Checkouts of the product whose commands are timed: this one, and another commit or folder with its own code."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.errors import LoradropError, UserError

ROOT = Path(__file__).resolve().parent.parent
_KEYS = """
import sys, yaml, pipeline
from pipeline.config import RunConfig, dump_config
def keys(tree, above=""):
    for name, below in tree.items():
        print(above + name)
        if isinstance(below, dict):
            keys(below, f"{above}{name}.")
print(pipeline.__file__)
keys(yaml.safe_load(dump_config(RunConfig())))
"""
"""Both layouts that the repository has had understand this: it says whose code runs, and which settings it knows."""


class CommandFailed(LoradropError):
    """A command that was to be timed did not end well."""


@dataclass(frozen=True)
class Checkout:
    """A folder with the product's code; it is driven by its command line and read by the files that it writes."""

    root: Path
    name: str
    """In tables: a commit, or the folder."""

    @property
    def environment(self) -> dict[str, str]:
        """Of its processes: its own code is imported, whatever is installed."""
        return {**os.environ, "PYTHONPATH": str(self.root)}

    def command(self, stage: str, run_dir: Path, overrides: Sequence[str]) -> list[str]:
        """What `bash launch.sh STAGE` starts once the environment is made; on the recipe `default`."""
        given = [] if stage in ("evaluate", "report", "export") else ["--config", "default"]
        return [sys.executable, "-m", "pipeline.cli", stage, *given, "--run-dir", str(run_dir), *overrides]

    def start(self, stage: str, run_dir: Path, overrides: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """The command in a process of its own; what it says goes into a log beside the run folder."""
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with _log_of(run_dir).open("ab") as log:
            return subprocess.Popen(
                self.command(stage, run_dir, overrides), cwd=self.root, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT,
            )

    def run(self, stage: str, run_dir: Path, overrides: Sequence[str] = ()) -> None:
        """The command from its start to its end.

        Raises:
            CommandFailed: with the end of what it said.
        """
        self.ended(self.start(stage, run_dir, overrides), run_dir)

    def ended(self, process: subprocess.Popen[bytes], run_dir: Path) -> None:
        """Wait for a command of `start`. Raises `CommandFailed`."""
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code:
            said = _log_of(run_dir).read_text(encoding="utf-8", errors="replace")[-3000:]
            raise CommandFailed(f"{self.name}: {' '.join(map(str, process.args))} ended with {code}:\n{said}")  # type: ignore[arg-type]

    def knows(self, key: str) -> bool:
        """Whether a dotted configuration key exists here."""
        return key in self._keys

    @cached_property
    def _keys(self) -> frozenset[str]:
        command = [sys.executable, "-c", _KEYS]
        found = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        place, *keys = found.stdout.splitlines() or [""]
        if found.returncode or not Path(place).is_relative_to(self.root):
            why = f"its code does not answer ({place or found.stderr.strip()[-300:]})"
            raise UserError("--against", self.name, why, "Give a commit of this repository, or a folder with one.")
        return frozenset(keys)


def _log_of(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.log")


def commit_of(root: Path) -> str:
    """The short commit that a folder stands at, with a mark where files differ from it; "unknown" without git."""
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return "unknown" if commit is None else commit + (" with changes" if changed else "")


@contextmanager
def open_checkout(text: str | None) -> Iterator[Checkout | None]:
    """The checkout that `--against` names: a folder as it is, or a commit, unpacked aside for as long as it is used.

    Raises:
        UserError: it is neither.
    """
    if text is None or Path(text).is_dir():
        root = None if text is None else Path(text).resolve()
        yield None if root is None else Checkout(root, commit_of(root) if (root / ".git").exists() else str(root))
        return
    commit = None if text.startswith("-") else _git(ROOT, "rev-parse", "--verify", "--short=12", f"{text}^{{commit}}")
    if not commit:
        raise UserError("--against", text, "is neither a folder nor a commit of this repository", "See git log.")
    with TemporaryDirectory(prefix="loradrop-against-") as folder:
        packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(packed)) as files:
            files.extractall(folder, filter="data")
        yield Checkout(Path(folder).resolve(), commit)


def _git(root: Path, *words: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    except OSError:
        return None
    return None if found.returncode else found.stdout.strip()
