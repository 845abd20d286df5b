"""Start each stage of a run folder as a process of its own, unless it is done."""

from __future__ import annotations

import sys

from pipeline.config import RunConfig, dump_config
from pipeline.distributed.launcher import run_stage, run_world_stage
from pipeline.errors import EXIT_OK
from pipeline.files import write_text
from pipeline.run_folder.paths import Folders, RunPaths, is_done, refuse_other


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


def headline(text: str) -> None:
    """What starts now, for people."""
    print(f"\n── {text} " + "─" * max(2, 66 - len(text)), file=sys.stderr, flush=True)
