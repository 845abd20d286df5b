"""The line of stages: what `run` does, and what each stage alone does. Every stage is a process of its own."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.compare import plan_steps, run_comparison
from pipeline.config import RunConfig, build_config, dump_config
from pipeline.config.adapter import KIND_NAMES, UNSET_RATES
from pipeline.config.load import find_recipe, merge_trees, overridden_tree, read_yaml, with_values
from pipeline.distributed.devices import accelerator_memory
from pipeline.distributed.launcher import has_accelerator, process_count, world_processes
from pipeline.distributed.nodes import check_nodes
from pipeline.epochs import length_text, resolve_epochs
from pipeline.errors import EXIT_OK, ConfigError, RunFolderError
from pipeline.files import ADAPTER_WEIGHTS, read_json, sha256_file, write_json, write_text
from pipeline.preflight import check_inputs
from pipeline.run_folder.paths import Folders, RunPaths, refuse_other
from pipeline.runner import headline, run_evaluate, run_export, run_report, run_search, run_training

REQUESTED = "requested.yaml"


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
    check_nodes(config.launch, stage)
    config = fit_micro_batch(config, stage)
    if dry_run:
        print(plan_text(stage, config, folders))
        if stage in ("run", "train"):
            print(f"\n{_memory_text(config)}")
        return EXIT_OK
    config = resolve_epochs(config)
    started = time.monotonic()
    code = STAGE_FUNCTIONS[stage](config, folders)
    if stage == "run" and code == EXIT_OK:
        print_outcome(folders, time.monotonic() - started)
    return code


def fit_micro_batch(config: RunConfig, stage: str) -> RunConfig:
    """`config` with the largest micro-batch, up to train.micro_batch, that divides a process's share of a step.

    Raises:
        ConfigError: the global batch cannot be shared out evenly.
    """
    train, processes = config.train, world_processes(config.launch)
    if stage not in ("run", "train", "compare") or processes is None:
        return config
    if train.global_batch % processes:
        fitting = -(-train.global_batch // processes) * processes
        raise ConfigError(
            "train.global_batch", train.global_batch, f"must be a multiple of the {processes} processes",
            f"Set train.global_batch={fitting}, or launch.processes.",
        )
    fitting = math.gcd(train.global_batch // processes, train.micro_batch)
    if fitting == train.micro_batch:
        return config
    print(f"train.micro_batch {train.micro_batch} -> {fitting}: what a process has of a step", file=sys.stderr)
    return config.model_copy(update={"train": train.model_copy(update={"micro_batch": fitting})})


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
        for word in overrides:
            if not word.startswith("launch."):
                remedy = f"Change it in {os.path.relpath(saved)}, or give the key to train."
                raise ConfigError(word, None, f"is not read by {stage}, which takes the run's config.yaml", remedy)
        base = read_yaml(saved)
    else:
        base = read_yaml(find_recipe(source or ("compare" if stage == "compare" else "default")))
        if source is None and any(word.startswith("data.path=") for word in overrides):
            base = {name: part for name, part in base.items() if name not in ("data", "label")}  # sizes of its own rows
    for word in overrides:
        if stage == "compare" and word.startswith(("adapter.method", "adapter.rate=", "adapter.rates")):
            remedy = "Give compare.methods=[{name: …, adapter: {method: …, rates: {…}}}]."
            raise ConfigError(word, None, "is not read by compare: each method has its own", remedy)
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
    unmasked = f"plain {KIND_NAMES[plain.adapter.kind]}"
    for name, run_config, folder in (("train", chosen, folders.run), (unmasked, plain, folders.plain)):
        headline(name)
        if code := run_training(run_config, Folders(folder)):
            return code
    write_related(folders)
    for stage in (run_evaluate, run_report, run_export):
        if code := stage(chosen, folders):
            return code
    return EXIT_OK


STAGE_FUNCTIONS: dict[str, Callable[[RunConfig, Folders], int]] = {
    "run": run_line,
    "search": run_search,
    "train": run_training,
    "evaluate": run_evaluate,
    "report": run_report,
    "export": run_export,
    "compare": run_comparison,
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
    refuse_other(requested, config)
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
        "train": f"{length_text(config.train)}, processes: {processes}, {config.train.deepspeed} -> {folders.run}",
        "plain": f"the same budget without dropout -> {folders.plain}",
        "evaluate": f"{config.ensemble.size} mask draws, 3 splits -> {folders.run / 'predictions'}",
        "report": f"{folders.run / 'report.html'}",
        "export": f"{', '.join(config.export.forms)} -> {folders.run / 'export'}",
    }
    shown = steps if stage == "run" else plan_steps(config, folders) if stage == "compare" else {stage: steps[stage]}
    lines = [dump_config(config).rstrip(), "", "plan (nothing has been started):"]
    return "\n".join([*lines, *(f"  {name:9} {text}" for name, text in shown.items())])


def _memory_text(config: RunConfig) -> str:
    """The memory plan. The one thing here that imports torch, and only for --dry-run."""
    from pipeline.memory_table import memory_table

    return memory_table(config, config.launch.processes or len(accelerator_memory()) or process_count(config.launch))


def print_outcome(folders: Folders, seconds: float) -> None:
    """The short table and the three paths that matter."""
    from pipeline.report import format_table

    print(format_table(read_json(RunPaths(folders.run).result)))
    print(f"\nfinished in {seconds / 60:.1f} minutes")
    for what, path in (("report", "report.html"), ("adapter", "adapter"), ("export", "export")):
        print(f"  {what:8} {os.path.relpath(folders.run / path)}")
