"""What the command line asks for, in plain values: no configuration is read yet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.errors import ConfigError, RunFolderError

LONGEST_NAME = 255 - len(".-compare.12345678")
"""Bytes of a run folder's name: siblings and files written aside have longer ones."""
_REMEDY = "Give the name of a new or an empty folder."


@dataclass(frozen=True)
class Request:
    """One command."""

    source: str | None = None
    """--config: a YAML file or the name of a recipe; None: the stage's own recipe."""
    run_dir: str | None = None
    """--run-dir; None: runs/ and the recipe's name."""
    overrides: tuple[str, ...] = ()
    """key.path=value."""
    quick: bool = False
    dry_run: bool = False
    rows: int = 2
    """Rows of each split that `data` shows."""
    fast: bool = False
    """`test`: without the slow tier."""
    gpu: bool = False
    """`test`: the acceptance of a device alone."""
    device: str | None = None
    """`test --gpu`: cuda or cpu; None: cuda."""
    fresh: bool = False
    """`test --gpu`: what has passed before does not count."""
    input: str | None = None
    """`predict`: a file with rows; `-`: JSON Lines on standard input."""
    output: str | None = None
    """`predict`: where answers are appended. `test --gpu`: the file with what has passed and was measured."""
    abstain: float | None = None
    """`predict`, `serve`: the risk that answered rows may have."""
    unlabelled: str | None = None
    """`distill`: a file with rows whose answers nobody knows."""
    host: str | None = None
    """`serve`: the address that is listened at; None: this machine alone."""
    port: int | None = None
    """`serve`: 0 is any that is free."""
    api_key_file: str | None = None
    """`serve`: whose first line clients have to show."""
    tasks: str | None = None
    """`eval`: names or files of tasks, separated by commas."""
    include_path: str | None = None
    """`eval`: a folder with task files."""
    limit: int | None = None
    """`eval`: rows of each task."""
    num_fewshot: int | None = None
    """`eval`: examples in the prompt."""
    json: bool = False
    """Print for programs instead of people, where the stage can."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` where --config is empty."""
        if self.source is not None and not self.source.strip():
            raise ConfigError("--config", self.source, "is empty", "Give a file or a recipe, or leave --config out.")

    @cached_property
    def run(self) -> Path:
        """The run folder.

        Raises:
            RunFolderError: the name that was given can be none.
        """
        name = (Path(self.source).stem if self.source else "default") + ("-quick" if self.quick else "")
        return usable_place(f"runs/{name}" if self.run_dir is None else self.run_dir)


def usable_place(given: str) -> Path:
    """The absolute path of the folder that a user names; it need not exist.

    Raises:
        RunFolderError: an empty name, a file or below one, a loop of symbolic links, a name that no file system takes.
    """
    if not given.strip():
        raise RunFolderError("--run-dir", given, "is empty", "Give a folder's name, or leave --run-dir out.")
    if not given.isprintable():
        raise RunFolderError("--run-dir", given, "holds characters that cannot be shown", _REMEDY)
    try:
        path = Path(given).expanduser().resolve()
        if path.exists() and not path.is_dir():
            raise RunFolderError("--run-dir", given, "is no folder", _REMEDY)
    except (OSError, RuntimeError, ValueError) as error:  # a loop is one or another, by the Python
        reason = getattr(error, "strerror", None) or str(error)
        raise RunFolderError("--run-dir", given, f"cannot be used ({reason})", _REMEDY) from error
    if path.name == "":
        raise RunFolderError("--run-dir", given, "is the root of the file system", _REMEDY)
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        remedy = f"Give one of at most {LONGEST_NAME} bytes."
        raise RunFolderError("--run-dir", given, "has too long a name", remedy)
    return path
