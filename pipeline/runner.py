"""Start each stage of a run folder as a process of its own, unless it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig, dump_config, load_config
from pipeline.errors import EXIT_OK, RunFolderError
from pipeline.launch import run_stage, run_world_stage
from pipeline.runs import RunPaths, read_status, write_text


@dataclass(frozen=True)
class Folders:
    """The run and the folders it refers to."""

    run: Path

    @property
    def plain(self) -> Path:
        """The same budget without dropout."""
        return self.run.with_name(f"{self.run.name}-plain")

    @property
    def search(self) -> Path:
        """Trials and ledger."""
        return self.run.with_name(f"{self.run.name}-search")

    @property
    def comparison(self) -> Path:
        """Methods compared on the same base, data and budget."""
        return self.run.with_name(f"{self.run.name}-compare")


def run_search(config: RunConfig, folders: Folders) -> int:
    """Ray Tune in a process of its own."""
    headline("search")
    folders.search.mkdir(parents=True, exist_ok=True)
    settings = folders.search / "config.yaml"
    refuse_other(settings, config)
    write_text(settings, dump_config(config))
    command = [sys.executable, "-m", "tune", "--config", str(settings), "--folder", str(folders.search)]
    return run_stage(command, folders.search / "logs" / "search.log", folders.search, "search")


def run_training(config: RunConfig, folders: Folders) -> int:
    """The DeepSpeed launcher around pipeline.train; continues from the newest checkpoint."""
    paths = RunPaths(folders.run)
    refuse_other(paths.config, config)
    if is_done(paths, "train") and paths.adapter.is_dir():
        print(f"{folders.run.name}: already trained", file=sys.stderr)
        return EXIT_OK
    write_text(paths.config, dump_config(config))
    return _launch("train", config, folders)


def run_evaluate(config: RunConfig, folders: Folders) -> int:
    """Predictions of all members, rows divided among all processes."""
    headline("evaluate")
    return _launch("evaluate", config, folders)


def run_report(config: RunConfig, folders: Folders) -> int:
    """Scores, tables, plots."""
    return run_process("report", folders)


def run_export(config: RunConfig, folders: Folders) -> int:
    """PEFT folders and their proof."""
    return run_process("export", folders)


def _launch(stage: str, config: RunConfig, folders: Folders) -> int:
    return run_world_stage(stage, folders.run, config.launch)


def run_process(stage: str, folders: Folders) -> int:
    """A stage that needs one process."""
    headline(stage)
    command = [sys.executable, "-m", f"pipeline.{stage}", "--run-dir", str(folders.run)]
    return run_stage(command, folders.run / "logs" / f"{stage}.log", folders.run, stage)


def refuse_other(saved: Path, config: RunConfig, part: Callable[[RunConfig], RunConfig] = lambda whole: whole) -> None:
    """Raises `RunFolderError` where a configuration that asks for another result (in the part that counts) is saved."""
    if saved.exists() and part(load_config(saved)).result_sha256() != part(config).result_sha256():
        raise RunFolderError(
            "--run-dir",
            str(saved.parent),
            "belongs to another configuration",
            "Give another --run-dir, or remove the folder.",
        )


def is_done(paths: RunPaths, stage: str) -> bool:
    """Whether the stage has ended well."""
    return read_status(paths).get(stage, {}).get("state") == "done"


def headline(text: str) -> None:
    """What starts now, for people."""
    print(f"\n── {text} " + "─" * max(2, 66 - len(text)), file=sys.stderr, flush=True)
