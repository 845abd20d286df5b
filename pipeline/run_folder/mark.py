"""The mark by which a folder is known as ours: nothing is written, renamed or removed in one that does not bear it.

    made_by.json    {"made_by": "loradrop", "what": "run" | "search" | "comparison", "layout": 2, "version": …}

A folder that comes from elsewhere bears it, too: the mark says whose files are lost where something goes wrong, not
whom to trust.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pipeline import __version__
from pipeline.errors import RunFolderError
from pipeline.files import read_json, write_json
from pipeline.run_folder.owner import OWNER
from pipeline.run_folder.paths import RunPaths, read_saved

MARK = "made_by.json"
LAYOUT = 2
"""Of run folders as this version writes them; 1 is that of versions before 0.2, which bore no mark."""
OTHER = "Give a new or an empty folder as --run-dir."

What = Literal["run", "search", "comparison"]
FOLDERS: dict[str, What] = {"run": "run", "plain": "run", "search": "search", "comparison": "comparison"}
"""A folder of `paths.Folders` -> what it is."""


def claim(folder: Path, what: What) -> None:
    """Make the folder, or go on in one of ours.

    Raises:
        RunFolderError: it holds something else, or cannot be made or written to.
    """
    if is_marked(folder):
        require_mark(folder, what)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _is_occupied(folder):
            raise _foreign(folder)
        write_json(folder / MARK, {"made_by": "loradrop", "what": what, "layout": LAYOUT, "version": __version__})
    except OSError as error:
        remedy = "Give a folder that you may write to."
        raise RunFolderError("--run-dir", str(folder), f"cannot be written to ({error.strerror})", remedy) from error


def refuse_foreign(folder: Path, what: What) -> None:
    """What `claim` would refuse, without making anything. Raises `RunFolderError`."""
    if is_marked(folder):
        require_mark(folder, what)
        return
    try:
        occupied = folder.exists() and _is_occupied(folder)
        parent = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:
        raise RunFolderError("--run-dir", str(folder), f"cannot be read ({error.strerror})", OTHER) from error
    if occupied:
        raise _foreign(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what_is = "cannot be written to" if parent.is_dir() else "is no folder"
        raise RunFolderError("--run-dir", str(folder), f"cannot be made: {parent} {what_is}", OTHER)


def require_mark(folder: Path, *expected: What) -> What:
    """What the folder is, by its mark.

    Raises:
        RunFolderError: it bears none or a damaged one, is something else, of a newer layout, or holds links out of it.
    """
    if not is_marked(folder):
        if not folder.is_dir() or not _is_occupied(folder):
            raise RunFolderError("--run-dir", str(folder), "holds no run", "Train first, or give its folder.")
        raise _foreign(folder)
    mark = read_json(folder / MARK, OTHER)
    known = isinstance(mark, dict) and mark.get("made_by") == "loradrop" and isinstance(mark.get("layout"), int)
    if not known or mark.get("what") not in list(FOLDERS.values()):
        raise RunFolderError(str(folder / MARK), None, "is damaged", OTHER)
    if mark["layout"] > LAYOUT:
        remedy = "Use that version, or give another --run-dir."
        raise RunFolderError("--run-dir", str(folder), f"was made by loradrop {mark.get('version')}", remedy)
    what: What = mark["what"]
    if expected and what not in expected:
        raise RunFolderError("--run-dir", str(folder), f"is a {what}, not a {' or a '.join(expected)}", OTHER)
    _refuse_links(folder)
    return what


def is_marked(folder: Path) -> bool:
    """Whether the folder bears a mark of ours."""
    try:
        return (folder / MARK).is_file()
    except OSError:
        return False


def _is_occupied(folder: Path) -> bool:
    """Whether it holds what is not ours: more than its owner's name, who is there before the mark is, and no mark.

    Looked at in this order, because another node of the same job may be marking it at this very moment.
    """
    ours = (OWNER, f".{MARK}.")
    return any(not path.name.startswith(ours) for path in folder.iterdir()) and not is_marked(folder)


def _foreign(folder: Path) -> RunFolderError:
    if RunPaths(folder).config.is_file():
        read_saved(RunPaths(folder).config)  # says so where an older version made it
    return RunFolderError("--run-dir", str(folder), "is not empty, and loradrop has not made what is in it", OTHER)


def _refuse_links(folder: Path) -> None:
    """A link that leads out of the folder would have its target read, written or removed in its place."""
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(here, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
                what = f"is a symbolic link that leads out of the run folder (to {os.readlink(path)})"
                raise RunFolderError(str(path), None, what, "Remove it, or put what it names in its place.")
        # Ray's own, gone when the search ends; Weights & Biases', which links to its log in the user's cache folder
        folders[:] = [name for name in folders if name not in (".ray", "wandb")]
