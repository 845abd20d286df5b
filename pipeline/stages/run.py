"""The line of stages that `run` is. Every stage is a process of its own."""

from __future__ import annotations

import os
import time

from pipeline.config import RunConfig, dump_config
from pipeline.config.adapter import KIND_NAMES, UNSET_RATES
from pipeline.config.load import with_values
from pipeline.config.space import FIXED, SEARCHABLE
from pipeline.errors import EXIT_OK, RunFolderError
from pipeline.files import read_json, write_text
from pipeline.run_folder.paths import Folders, RunPaths, refuse_other
from pipeline.run_folder.related import SEARCH, write_related
from pipeline.stages.processes import headline, start
from pipeline.stages.search import run_search
from pipeline.terminal import duration, one_line


def run_line(config: RunConfig, folders: Folders) -> int:
    """search → train (LoRA Dropout) → train (plain LoRA) → evaluate → report → export.

    Raises:
        RunFolderError: the folder holds another request, or a training of values that the search does not choose;
            search.json chooses what no search varies.
    """
    started, paths, plain = time.monotonic(), RunPaths(folders.run), Folders(folders.plain)
    refuse_other(paths.requested, config)
    write_text(paths.requested, dump_config(config))
    if code := run_search(config, folders):
        return code
    found = read_json(folders.search / SEARCH, "Run the search stage first.")
    if strange := [key for key in found["best_config"] if not key.startswith(SEARCHABLE) or key in FIXED]:
        what = f"chooses {strange[0]}, which no search varies"  # a host or a path, say, of whoever made the folder
        raise RunFolderError(str(folders.search / SEARCH), None, what, "Search in another --run-dir.")
    chosen = with_values(config, found["best_config"])
    headline("train")
    if code := start("train", chosen, folders):
        return code
    headline(f"plain {KIND_NAMES[config.adapter.kind]}")
    if code := start("train", with_values(chosen, {"adapter.method": "none", **UNSET_RATES}), plain):
        return code
    write_related(paths, folders.plain, folders.search)
    for stage in ("evaluate", "report", "export"):
        if code := start(stage, chosen, folders):
            return code
    print_outcome(folders, time.monotonic() - started)
    return EXIT_OK


def refuse_trained(folders: Folders) -> None:
    """Raises `RunFolderError` where the folder holds what `train` made: no search chose its values."""
    paths = RunPaths(folders.run)
    if paths.config.exists() and not paths.requested.exists():
        remedy = "Give another --run-dir: the search decides what is trained in it."
        raise RunFolderError("--run-dir", str(folders.run), "holds what `train` made, with settings of its own", remedy)


def print_outcome(folders: Folders, seconds: float) -> None:
    """The short table and the three paths that matter."""
    from pipeline.report.tables import format_table

    print(format_table(read_json(RunPaths(folders.run).result)))
    print(f"\nfinished in {duration(seconds)}")
    for what, path in (("report", "report.html"), ("adapter", "adapter"), ("export", "export")):
        print(f"  {what:8} {one_line(os.path.relpath(folders.run / path))}")
