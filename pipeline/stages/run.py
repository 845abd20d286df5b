"""The line of stages that `run` is. Every stage is a process of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, dump_config
from pipeline.config.adapter import KIND_NAMES, UNSET_RATES
from pipeline.config.load import with_values
from pipeline.errors import EXIT_OK
from pipeline.files import ADAPTER_WEIGHTS, read_json, sha256_file, write_json, write_text
from pipeline.run_folder.paths import Folders, RunPaths, refuse_other
from pipeline.stages.processes import headline, start
from pipeline.stages.search import run_search

REQUESTED = "requested.yaml"


def run_line(config: RunConfig, folders: Folders) -> int:
    """search → train (LoRA Dropout) → train (plain LoRA) → evaluate → report → export."""
    started = time.monotonic()
    claim(folders.run, config)
    if code := run_search(config, folders):
        return code
    chosen = with_best(config, folders.search)
    write_text(RunPaths(folders.run).config, dump_config(chosen))
    plain = plain_config(chosen)
    unmasked = f"plain {KIND_NAMES[plain.adapter.kind]}"
    for name, run_config, folder in (("train", chosen, folders.run), (unmasked, plain, folders.plain)):
        headline(name)
        if code := start("train", run_config, Folders(folder)):
            return code
    write_related(folders)
    for stage in ("evaluate", "report", "export"):
        if code := start(stage, chosen, folders):
            return code
    print_outcome(folders, time.monotonic() - started)
    return EXIT_OK


def with_best(config: RunConfig, search_folder: Path) -> RunConfig:
    """The configuration with the values of the search's best trial."""
    found: dict[str, Any] = read_json(search_folder / "search.json", "Run the search stage first.")
    return with_values(config, found["best_config"])


def plain_config(config: RunConfig) -> RunConfig:
    """The same budget without any dropout."""
    return with_values(config, {"adapter.method": "none", **UNSET_RATES})


def write_related(folders: Folders) -> None:
    """related.json: what evaluation compares the run with, by place and hash."""
    plain = {
        "run": f"../{folders.plain.name}",
        "adapter_sha256": sha256_file(folders.plain / "adapter" / ADAPTER_WEIGHTS),
    }
    write_json(RunPaths(folders.run).related, {"plain": plain, "search": {"folder": f"../{folders.search.name}"}})


def claim(run: Path, config: RunConfig) -> None:
    """Remember what was asked for. Raises `RunFolderError` where the folder holds another request."""
    requested = run / REQUESTED
    refuse_other(requested, config)
    write_text(requested, dump_config(config))


def print_outcome(folders: Folders, seconds: float) -> None:
    """The short table and the three paths that matter."""
    from pipeline.report.tables import format_table

    print(format_table(read_json(RunPaths(folders.run).result)))
    print(f"\nfinished in {seconds / 60:.1f} minutes")
    for what, path in (("report", "report.html"), ("adapter", "adapter"), ("export", "export")):
        print(f"  {what:8} {os.path.relpath(folders.run / path)}")
