"""The line of stages that `run` is. Every stage is a process of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.config import RunConfig, SearchConfig, dump_config
from pipeline.config.adapter import KIND_NAMES
from pipeline.config.load import with_values, without_dropout
from pipeline.config.space import FIXED, OF_DROPOUT, SEARCHABLE
from pipeline.errors import EXIT_OK, LoradropError, RunFolderError
from pipeline.files import read_json, write_text
from pipeline.run_folder.belongs import holds_training, refuse_other
from pipeline.run_folder.chain import is_trained
from pipeline.run_folder.paths import Folders, RunPaths, load_saved
from pipeline.run_folder.related import SEARCH, write_related
from pipeline.stages.processes import headline, start
from pipeline.stages.search import run_search
from pipeline.terminal import duration, one_line, say


def run_line(config: RunConfig, folders: Folders) -> int:
    """search → train (LoRA Dropout) → train (plain LoRA) → evaluate → report → export.

    Each trains with the values that its own arm of the search chose; plain LoRA with those of the method where the
    search has no arm for it. Once both are trained, the rows that are evaluated may be others than those that the
    search chose by: it is then left as it is.

    Raises:
        RunFolderError: the folder holds another request, or a training of values that the search does not choose;
            search.json chooses what no search varies.
    """
    started, paths, plain = time.monotonic(), RunPaths(folders.run), Folders(folders.plain)
    trained = trained_configs(config, folders)
    if holds_training(folders.run) or holds_training(folders.plain):
        refuse_other(paths.requested, config, begun_line if trained is None else trained_line)
    write_text(paths.requested, dump_config(config))
    if trained is None or load_saved(RunPaths(folders.search).config).data == config.data:
        if code := run_search(config, folders):
            return code
        trained = chosen_configs(config, folders.search)
    chosen, chosen_plain = trained
    headline("train")
    if code := start("train", chosen, folders):
        return code
    headline(f"plain {KIND_NAMES[config.adapter.kind]}")
    if code := start("train", chosen_plain, plain):
        return code
    write_related(paths, folders.plain, folders.search)
    for stage in ("evaluate", "report", "export"):
        if code := start(stage, chosen, folders):
            return code
    print_outcome(folders, time.monotonic() - started)
    return EXIT_OK


def trained_configs(config: RunConfig, folders: Folders) -> tuple[RunConfig, RunConfig] | None:
    """What the search has chosen for both trainings, where they have ended with it; else None."""
    if not all(path.exists() for path in (folders.search / SEARCH, RunPaths(folders.search).config)):
        return None
    try:
        chosen = chosen_configs(config, folders.search)
    except (LoradropError, AttributeError, KeyError, TypeError):  # damaged: the search concludes again
        return None
    places = (folders.run, folders.plain)
    done = all(is_trained(RunPaths(run), own) for run, own in zip(places, chosen, strict=True))
    return chosen if done else None


def begun_line(config: RunConfig) -> RunConfig:
    """What may not change between two calls for one line: how many trials there are decides what is trained."""
    free = {name: SearchConfig.model_fields[name].default for name in ("concurrent", "pack", "adapters")}
    return config.begun_part().model_copy(update={"search": config.search.model_copy(update=free)})


def trained_line(config: RunConfig) -> RunConfig:
    """The same once both trainings have ended."""
    return config.training_part().model_copy(update={"search": begun_line(config).search})


def chosen_configs(config: RunConfig, search: Path) -> tuple[RunConfig, RunConfig]:
    """The method's run and that of plain LoRA, with what search.json chooses for each.

    Raises:
        RunFolderError: it chooses what no search varies: a host or a path, say, of whoever made the folder.
    """
    found = read_json(search / SEARCH, "Run the search stage first.")
    own = found.get("plain") or {}
    for values, refused in ((found["best_config"], ()), (own.get("best_config", {}), OF_DROPOUT)):
        strange = [key for key in values if not key.startswith(SEARCHABLE) or key.startswith(refused) or key in FIXED]
        if strange:
            what = f"chooses {strange[0]}, which no search varies"
            raise RunFolderError(str(search / SEARCH), None, what, "Search in another --run-dir.")
    chosen = with_values(config, found["best_config"])
    if not own:
        return chosen, without_dropout(chosen)
    return chosen, with_values(without_dropout(config), own["best_config"])


def refuse_trained(folders: Folders) -> None:
    """Raises `RunFolderError` where the folder holds what `train` made: no search chose its values."""
    paths = RunPaths(folders.run)
    if holds_training(folders.run) and not paths.requested.exists():
        remedy = "Give another --run-dir: the search decides what is trained in it."
        raise RunFolderError("--run-dir", str(folders.run), "holds what `train` made, with settings of its own", remedy)


def say_trained(run_dir: Path) -> None:
    """Where the adapter of a training by itself lies, and what comes next: no result, so not on stdout."""
    folder = one_line(os.path.relpath(run_dir))
    say(f"adapter      {folder}/adapter")
    say(f"next         evaluate, report and export, each with --run-dir {folder}")


def print_outcome(folders: Folders, seconds: float) -> None:
    """The short table and the three paths that matter."""
    from pipeline.stages.report import print_result

    print_result(RunPaths(folders.run))
    print(f"\nfinished in {duration(seconds)}")
    for what, path in (("report", "report.html"), ("adapter", "adapter"), ("export", "export")):
        print(f"  {what:8} {one_line(os.path.relpath(folders.run / path))}")
