"""Start a stage of a run folder in processes of its own."""

from __future__ import annotations

import sys

from pipeline.config import RunConfig, dump_config
from pipeline.distributed.launcher import run_stage, run_world_stage
from pipeline.distributed.nodes import owned_folders
from pipeline.errors import EXIT_OK
from pipeline.files import write_text
from pipeline.run_folder.chain import is_trained
from pipeline.run_folder.mark import claim
from pipeline.run_folder.paths import Folders, RunPaths, refuse_other, update_status
from pipeline.stages.table import STAGES, TRUST


def start(name: str, config: RunConfig, folders: Folders) -> int:
    """Start a stage and wait for it; its exit code.

    One with a new configuration, as training, makes the run folder, is not started again once it is done, and gets its
    headline from the line that it is part of: several trainings have different ones.

    Raises:
        RunFolderError: the folder belongs to another configuration, or is not ours.
    """
    shared = config.launch if STAGES[name].processes == "all" else None
    with owned_folders([folders.run], name, shared):  # the command has its own folders already, not all trainings
        return _start(name, config, folders)


def _start(name: str, config: RunConfig, folders: Folders) -> int:
    stage, paths = STAGES[name], RunPaths(folders.run)
    if stage.settings == "new":
        claim(folders.run, "run")
        refuse_other(paths.config, config)
        if is_trained(paths, config):
            print(f"{folders.run.name}: already trained", file=sys.stderr)
            return EXIT_OK
        write_text(paths.config, dump_config(config))
    else:
        headline(name)
    update_status(paths, name, "starting", config_sha256=config.training_sha256())
    program = ["pipeline.stages", name]
    if stage.loads_model and config.model.trust_remote_code:
        program.append(TRUST)
    if stage.processes == "all":
        return run_world_stage(name, program, folders.run, config.launch)
    command = [sys.executable, "-m", *program, "--run-dir", str(folders.run)]
    return run_stage(command, folders.run / "logs" / f"{name}.log", folders.run, name)


def headline(text: str) -> None:
    """What starts now, for people."""
    print(f"\n── {text} " + "─" * max(2, 66 - len(text)), file=sys.stderr, flush=True)
