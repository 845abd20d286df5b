"""Start a stage of a run folder in processes of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config import RunConfig, dump_config
from pipeline.distributed.launcher import run_stage, run_world_stage
from pipeline.distributed.nodes import owned_folders
from pipeline.errors import EXIT_OK
from pipeline.files import write_text
from pipeline.run_folder.belongs import holds_training, refuse_other
from pipeline.run_folder.chain import Origin, is_trained, require_adapter
from pipeline.run_folder.mark import claim
from pipeline.run_folder.paths import Folders, RunPaths, load_saved, update_status
from pipeline.stages.table import STAGES, TRUST, Stage


def start(name: str, config: RunConfig, folders: Folders) -> int:
    """Start a stage and wait for it; its exit code.

    One with a new configuration, as training, makes the run folder, is not started again once it is done, and gets its
    headline from the line that it is part of: several trainings have different ones.

    Raises:
        RunFolderError: the folder belongs to another configuration, or is not ours; the adapter that the stage needs
            is missing, damaged, or of another configuration.
    """
    shared = config.launch if STAGES[name].processes == "all" else None
    with owned_folders([folders.run], name, shared):  # the command has its own folders already, not all trainings
        return _start(name, config, folders)


def _start(name: str, config: RunConfig, folders: Folders) -> int:
    stage, paths = STAGES[name], RunPaths(folders.run)
    if stage.settings == "new":
        if not begin_training(config, folders.run):
            print(f"{folders.run.name}: already trained", file=sys.stderr)
            return EXIT_OK
    else:
        headline(name)
        check_adapter(stage, config, folders)
        follow(paths, config)
    update_status(paths, name, "starting", config_sha256=config.training_sha256())
    program = ["pipeline.stages", name]
    if stage.loads_model and config.model.trust_remote_code:
        program.append(TRUST)
    if stage.processes == "all":
        return run_world_stage(name, program, folders.run, config.launch)
    command = [sys.executable, "-m", *program, "--run-dir", str(folders.run)]
    return run_stage(command, folders.run / "logs" / f"{name}.log", folders.run, name)


def begin_training(config: RunConfig, run: Path) -> bool:
    """Make the run folder of a training, or go on in it; False where it is trained already.

    Raises:
        RunFolderError: it belongs to another configuration, or is not ours.
    """
    paths = RunPaths(run)
    claim(run, "run")
    trained = is_trained(paths, config)
    if holds_training(run):  # else it ended before its first step, over a value that is mended now
        refuse_other(paths.config, config, RunConfig.training_part if trained else RunConfig.begun_part)
    if trained:
        follow(paths, config)
        return False
    write_text(paths.config, dump_config(config))
    return True


def follow(paths: RunPaths, config: RunConfig) -> None:
    """Let config.yaml say of what may change after a training what `config` says; how it was trained stays."""
    saved = load_saved(paths.config)
    if (followed := saved.read_as(config)) != saved:
        write_text(paths.config, dump_config(followed))


def check_adapter(stage: Stage, config: RunConfig, folders: Folders) -> None:
    """Raises `RunFolderError` where the stage needs the run's adapter, and it is missing, damaged or another one."""
    paths = RunPaths(folders.run)
    if stage.needs_adapter and not paths.comparison.exists():
        require_adapter(paths, Origin(config.training_sha256()))


def headline(text: str) -> None:
    """What starts now, for people."""
    print(f"\n── {text} " + "─" * max(2, 66 - len(text)), file=sys.stderr, flush=True)
