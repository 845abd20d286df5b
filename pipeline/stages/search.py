"""The search: Ray Tune in a process of its own."""

from __future__ import annotations

import sys

from pipeline.config import RunConfig, SearchConfig, dump_config
from pipeline.distributed.launcher import run_stage
from pipeline.files import write_text
from pipeline.run_folder.belongs import TRIALS, forget_untrained, holds_trainings, is_other, refuse_other
from pipeline.run_folder.paths import Folders
from pipeline.stages.processes import headline
from pipeline.stages.table import TRUST


def run_search(config: RunConfig, folders: Folders) -> int:
    """Ray Tune in a process of its own."""
    headline("search")
    settings = folders.search / "config.yaml"
    if holds_trainings(folders.search / TRIALS):
        refuse_other(settings, config, fixed_part)
    elif is_other(settings, config, fixed_part):
        forget_untrained(folders.search)
    write_text(settings, dump_config(config))
    command = [sys.executable, "-m", "tune", "--config", str(settings), "--folder", str(folders.search)]
    if config.model.trust_remote_code:
        command.append(TRUST)
    return run_stage(command, folders.search / "logs" / "search.log", folders.search, "search")


def fixed_part(config: RunConfig) -> RunConfig:
    """What may not change between two calls for one search: how many trials there are, and how they run, may."""
    free = {name: SearchConfig.model_fields[name].default for name in ("trials", "concurrent", "pack", "adapters")}
    return config.begun_part().model_copy(update={"search": config.search.model_copy(update=free)})
