"""A case as data, and how its files are laid out."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

What = Literal["bytes", "append", "fifo", "link", "folder", "sparse", "copy", "remove", "mode"]


@dataclass(frozen=True)
class Item:
    """One thing done to the case's folder; `{base}` in its content stands for the shared material."""

    path: str
    what: What
    content: bytes = b""
    """Of `bytes`, `append`: what is written; of `link`: where to; of `copy`: which of the material; of `sparse`: the
    size; of `mode`: the permissions, in octal."""


@dataclass(frozen=True)
class Case:
    """One command with what it meets. `{base}` and `{here}` in the arguments stand for the material and the case."""

    kind: str
    argv: tuple[str, ...]
    items: tuple[Item, ...] = ()
    entry: Literal["main", "inputs"] = "main"
    """`main`: the command line. `inputs`: what a report reads of the run folder argv[0], without its plots."""
    may_change: tuple[str, ...] = ()
    """Beginnings of paths that the command may make or change."""

    def text(self, number: int) -> str:
        """For people."""
        shown = [f"case {number} ({self.kind}, {self.entry})", f"  argv: {_short(list(self.argv))}"]
        return "\n".join(shown + [f"  {item.what:6} {item.path!r} {_short(item.content)}" for item in self.items])


def lay_out(case: Case, here: Path, base: Path) -> None:
    """Do the items in turn; one whose folder an earlier one replaced is left out."""
    for item in case.items:
        with contextlib.suppress(OSError):
            (here / item.path).parent.mkdir(parents=True, exist_ok=True)
            _do(item, here / item.path, item.content.replace(b"{base}", os.fsencode(base)), base)


def _do(item: Item, path: Path, content: bytes, base: Path) -> None:
    if item.what == "mode":
        path.chmod(int(content, 8))
        return
    if item.what == "append":
        if stat.S_ISREG(path.lstat().st_mode):
            with path.open("ab") as file:
                file.write(content)
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match item.what:
        case "bytes":
            path.write_bytes(content)
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to(os.fsdecode(content))
        case "folder":
            path.mkdir()
        case "sparse":
            path.touch()
            os.truncate(path, int(content))
        case "copy":
            shutil.copytree(base / os.fsdecode(content), path, symlinks=True)


def arguments(case: Case, here: Path, base: Path) -> list[str]:
    """The arguments with their folders."""
    return [word.replace("{base}", str(base)).replace("{here}", str(here)) for word in case.argv]


def _short(value: object, limit: int = 2000) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
