"""related.json: the plain run and the search that evaluation compares a run with, by place and hash."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunFolderError
from pipeline.files import ADAPTER_WEIGHTS, read_json, sha256_file, write_json
from pipeline.run_folder.paths import RunPaths

SEARCH, LEDGER = "search.json", "ledger.jsonl"
"""In the folder of a search: its result, and every event of it."""
_REMEDY = "Run the whole line again, or remove the file: then nothing is compared with."


@dataclass(frozen=True)
class Related:
    """What a run is compared with."""

    plain: Path | None = None
    """Run folder of the same budget without dropout."""
    plain_sha256: str | None = None
    """Hash of its adapter's weights."""
    search: Path | None = None
    """Folder of the search that chose the run's values."""
    search_identity: str | None = None
    """Hash of what it searched and where: more trials leave it as it is."""


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that evaluation may predict with."""

    name: str
    run: Path
    rank: tuple[bool, float]
    """Trials that ended in full first, by what the search chose by; those stopped early by their validation NLL."""
    adapter_sha256: str | None


def write_related(paths: RunPaths, plain: Path, search: Path) -> None:
    """Name both, siblings of the run, by relative paths: the three may be moved together."""
    sha256 = sha256_file(RunPaths(plain).adapter / ADAPTER_WEIGHTS)
    found = read_search(search) or {}
    searched = {"folder": f"../{search.name}", "identity": found.get("identity")}
    write_json(paths.related, {"plain": {"run": f"../{plain.name}", "adapter_sha256": sha256}, "search": searched})


def read_related(paths: RunPaths) -> Related:
    """What related.json says; nothing where it is not there.

    Raises:
        RunFolderError: it is damaged.
    """
    if not paths.related.exists():
        return Related()
    content = read_json(paths.related, _REMEDY)
    try:
        plain, search = content.get("plain") or {}, content.get("search") or {}
        run, sha256, folder = plain.get("run"), plain.get("adapter_sha256"), search.get("folder")
        identity = search.get("identity")
    except AttributeError as error:
        raise RunFolderError(str(paths.related), None, "is no mapping of names to entries", _REMEDY) from error
    named = [value for value in (run, sha256, folder, identity) if value is not None]
    if not all(isinstance(value, str) and "\0" not in value for value in named):
        raise RunFolderError(str(paths.related), None, "names folders and hashes that are no texts", _REMEDY)
    return Related(_place(paths, run), sha256, _place(paths, folder), identity)


def _place(paths: RunPaths, name: str | None) -> Path | None:
    return None if name is None else Path(os.path.realpath(paths.root / name))  # a loop of links is no error here


def read_search(folder: Path, identity: str | None = None) -> dict[str, Any] | None:
    """search.json of a search; None where it is not there.

    Args:
        identity: of the search that is meant; None: any.

    Raises:
        RunFolderError: it is no record of a search, or that of another one.
    """
    path = folder / SEARCH
    if not path.exists():
        return None
    found = read_json(path)
    if not _lists_trials(found) or not (found.get("plain") is None or _lists_trials(found["plain"])):
        raise RunFolderError(str(path), None, "is no record of a search", "Search again.")
    if identity is not None and found.get("identity") != identity:
        what = "is of another search than the one that chose this run's values"
        raise RunFolderError(str(path), None, what, "Put that one back, or run the whole line again.")
    return dict(found)


def _lists_trials(found: Any) -> bool:
    trials = found.get("trials") if isinstance(found, dict) else None
    return isinstance(trials, list) and all(isinstance(trial, dict) for trial in trials)


def finished_trials(folder: Path, identity: str | None = None) -> list[FinishedTrial]:
    """The method's trials of a search that have a validation, best first.

    Raises:
        RunFolderError: as `read_search`, and where there is no search.
    """
    found = read_search(folder, identity)
    if found is None:
        raise RunFolderError(str(folder / SEARCH), None, "does not exist", "Put the search's folder back.")
    trials = [trial for trial in found["trials"] if trial.get("validation_nll") is not None]
    try:
        listed = [
            FinishedTrial(str(t["name"]), folder / t["run"], _rank(t), t["adapter_sha256"]) for t in trials
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(str(folder / SEARCH), None, f"is damaged ({error!r})", "Search again.") from error
    return sorted(listed, key=lambda trial: trial.rank)


def _rank(trial: dict[str, Any]) -> tuple[bool, float]:
    loss = trial.get("validation_loss")
    return loss is None, float(trial["validation_nll"] if loss is None else loss)
