"""The line of stages: what `run` does, and what each stage alone does. Every stage is a process of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, build_config, dump_config, load_config
from pipeline.config.load import find_recipe, merge_trees, overridden_tree, read_yaml, with_values
from pipeline.errors import EXIT_OK, RunFolderError
from pipeline.launch import has_accelerator, launcher_command, launcher_environment, process_count, run_stage
from pipeline.preflight import check_inputs
from pipeline.runs import ADAPTER_WEIGHTS, RunPaths, read_json, sha256_file, write_json, write_text

REQUESTED = "requested.yaml"
UNSET_RATES: dict[str, Any] = {"adapter.rate": None, "adapter.rates": {}}
"""What a configuration says when a method keeps its own rates."""


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


def execute(
    stage: str, source: str | None, run_dir: Path | None, overrides: list[str], quick: bool, dry_run: bool
) -> int:
    """Resolve the configuration, check everything that can be checked without a model, run the stage.

    Raises:
        UserError: something to mend, before any model is loaded or anything is written.
    """
    folders = Folders((run_dir or Path("runs") / default_name(source, quick)).resolve())
    config = resolve(stage, source, folders, overrides, quick)
    check_inputs(config)
    if dry_run:
        print(plan_text(stage, config, folders))
        return EXIT_OK
    started = time.monotonic()
    code = STAGE_FUNCTIONS[stage](config, folders)
    if stage == "run" and code == EXIT_OK:
        print_outcome(folders, time.monotonic() - started)
    return code


def show(source: str | None, run_dir: Path | None, overrides: list[str], quick: bool, rows: int) -> int:
    """Print rows of the configured data, or of a run's where its folder is given.

    Raises:
        UserError: something to mend in the configuration or the data.
    """
    from pipeline.view import show_data

    folders = Folders((run_dir or Path("runs") / default_name(source, quick)).resolve())
    saved = run_dir is not None and source is None and RunPaths(folders.run).config.exists()
    config = resolve("evaluate" if saved else "data", source, folders, overrides, quick)
    check_inputs(config)
    show_data(config, max(0, rows))
    return EXIT_OK


def default_name(source: str | None, quick: bool) -> str:
    """Name of the run folder where none is given."""
    return (Path(source).stem if source else "default") + ("-quick" if quick else "")


def resolve(stage: str, source: str | None, folders: Folders, overrides: list[str], quick: bool) -> RunConfig:
    """The configuration in force: recipe, quick recipe, overrides; for a finished run's later stages, its own.

    Raises:
        ConfigError: anything wrong with keys or values.
        RunFolderError: the run folder belongs to another configuration.
    """
    saved = RunPaths(folders.run).config
    if stage in ("evaluate", "report", "export"):
        if not saved.exists():
            raise RunFolderError("--run-dir", str(folders.run), "holds no run", "Train first, or give its folder.")
        base = read_yaml(saved)
    else:
        base = read_yaml(find_recipe(source or "default"))
    if quick:
        base = merge_trees(base, read_yaml(find_recipe("quick")))
    return build_config(overridden_tree(base, overrides))


def run_line(config: RunConfig, folders: Folders) -> int:
    """search → train (LoRA Dropout) → train (plain LoRA) → evaluate → report → export."""
    claim(folders.run, config)
    code = run_search(config, folders)
    if code:
        return code
    chosen = with_best(config, folders.search)
    write_text(RunPaths(folders.run).config, dump_config(chosen))
    plain = plain_config(chosen)
    for name, run_config, folder in (("train", chosen, folders.run), ("plain LoRA", plain, folders.plain)):
        _headline(name)
        if code := run_training(run_config, Folders(folder)):
            return code
    write_related(folders)
    for stage in (run_evaluate, run_report, run_export):
        if code := stage(chosen, folders):
            return code
    return EXIT_OK


def run_search(config: RunConfig, folders: Folders) -> int:
    """Ray Tune in a process of its own."""
    _headline("search")
    folders.search.mkdir(parents=True, exist_ok=True)
    settings = folders.search / "config.yaml"
    _refuse_other(settings, config)
    write_text(settings, dump_config(config))
    command = [sys.executable, "-m", "tune", "--config", str(settings), "--folder", str(folders.search)]
    return run_stage(command, folders.search / "logs" / "search.log", folders.search, "search")


def run_training(config: RunConfig, folders: Folders) -> int:
    """The DeepSpeed launcher around pipeline.train; continues from the newest checkpoint."""
    paths = RunPaths(folders.run)
    _refuse_other(paths.config, config)
    if _is_done(paths, "train") and paths.adapter.is_dir():
        print(f"{folders.run.name}: already trained", file=sys.stderr)
        return EXIT_OK
    write_text(paths.config, dump_config(config))
    return _launch("train", config, folders)


def run_evaluate(config: RunConfig, folders: Folders) -> int:
    """Predictions of all members, rows divided among all processes."""
    _headline("evaluate")
    return _launch("evaluate", config, folders)


def run_report(config: RunConfig, folders: Folders) -> int:
    """Scores, tables, plots."""
    return _single_process("report", folders)


def run_export(config: RunConfig, folders: Folders) -> int:
    """PEFT folders and their proof."""
    return _single_process("export", folders)


STAGE_FUNCTIONS: dict[str, Callable[[RunConfig, Folders], int]] = {
    "run": run_line,
    "search": run_search,
    "train": run_training,
    "evaluate": run_evaluate,
    "report": run_report,
    "export": run_export,
}


def with_best(config: RunConfig, search_folder: Path) -> RunConfig:
    """The configuration with the values of the search's best trial."""
    found: dict[str, Any] = read_json(search_folder / "search.json", "Run the search stage first.")
    return with_values(config, found["best_config"])


def plain_config(config: RunConfig) -> RunConfig:
    """The same budget without any dropout."""
    return with_values(config, {"adapter.method": "none", **UNSET_RATES})


def write_related(folders: Folders) -> None:
    """members.json: what evaluation compares the run with, by place and hash."""
    plain = {
        "run": f"../{folders.plain.name}",
        "adapter_sha256": sha256_file(folders.plain / "adapter" / ADAPTER_WEIGHTS),
    }
    write_json(RunPaths(folders.run).members, {"plain": plain, "search": {"folder": f"../{folders.search.name}"}})


def claim(run: Path, config: RunConfig) -> None:
    """Remember what was asked for. Raises `RunFolderError` where the folder holds another request."""
    requested = run / REQUESTED
    _refuse_other(requested, config)
    write_text(requested, dump_config(config))


def plan_text(stage: str, config: RunConfig, folders: Folders) -> str:
    """What --dry-run prints."""
    processes = (
        "one per visible accelerator"
        if has_accelerator() and not config.launch.processes
        else process_count(config.launch)
    )
    steps = {
        "search": f"{config.search.trials} trials of {config.search.max_steps} steps -> {folders.search}",
        "train": f"{config.train.max_steps} steps, processes: {processes}, {config.train.deepspeed} -> {folders.run}",
        "plain": f"the same budget without dropout -> {folders.plain}",
        "evaluate": f"{config.ensemble.size} mask draws, 3 splits -> {folders.run / 'predictions'}",
        "report": f"{folders.run / 'report.html'}",
        "export": f"{', '.join(config.export.forms)} -> {folders.run / 'export'}",
    }
    shown = steps if stage == "run" else {stage: steps[stage]}
    lines = [dump_config(config).rstrip(), "", "plan (nothing has been started):"]
    return "\n".join([*lines, *(f"  {name:9} {text}" for name, text in shown.items())])


def print_outcome(folders: Folders, seconds: float) -> None:
    """The short table and the three paths that matter."""
    from pipeline.report import format_table

    print(format_table(read_json(RunPaths(folders.run).result)))
    print(f"\nfinished in {seconds / 60:.1f} minutes")
    for what, path in (("report", "report.html"), ("adapter", "adapter"), ("export", "export")):
        print(f"  {what:8} {os.path.relpath(folders.run / path)}")


def _launch(stage: str, config: RunConfig, folders: Folders) -> int:
    return run_stage(
        launcher_command(f"pipeline.{stage}", folders.run, config.launch),
        folders.run / "logs" / f"{stage}.log",
        folders.run,
        stage,
        launcher_environment(config.launch),
    )


def _single_process(stage: str, folders: Folders) -> int:
    _headline(stage)
    command = [sys.executable, "-m", f"pipeline.{stage}", "--run-dir", str(folders.run)]
    return run_stage(command, folders.run / "logs" / f"{stage}.log", folders.run, stage)


def _refuse_other(saved: Path, config: RunConfig) -> None:
    if saved.exists() and load_config(saved).sha256() != config.sha256():
        raise RunFolderError(
            "--run-dir",
            str(saved.parent),
            "belongs to another configuration",
            "Give another --run-dir, or remove the folder.",
        )


def _is_done(paths: RunPaths, stage: str) -> bool:
    return paths.status.exists() and read_json(paths.status).get(stage, {}).get("state") == "done"


def _headline(text: str) -> None:
    print(f"\n── {text} " + "─" * max(2, 66 - len(text)), file=sys.stderr, flush=True)
