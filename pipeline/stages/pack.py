"""The stage that trains a list of runs in one process, on one base: what a comparison starts for its trainings."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.run import RunConfig
from pipeline.errors import RunFolderError, Stopped
from pipeline.files import read_json, write_json
from pipeline.run_folder.chain import is_trained
from pipeline.run_folder.paths import RunPaths, load_saved

PLAN = "pack.json"
"""In the folder that holds the runs: which of them share a pack."""


def write_plan(folder: Path, runs: list[Path], at_once: int | None = None) -> None:
    """Say which run folders, whose config.yaml's are written, the stage is to train.

    Args:
        runs: relative to `folder`, in the order in which they are admitted.
        at_once: how many may share the pack; None = as many as fit.
    """
    write_json(folder / PLAN, {"runs": [str(run) for run in runs], "at_once": at_once})


def pack_stage(folder: Path, trusted: bool = False) -> None:
    """Train what pack.json of the folder says and is not trained yet; each run's status.json says how it ended.

    The base and the rows are those of the folder's own config.yaml. A run that fails does not stop the others.

    Raises:
        RunFolderError: there is no such plan.
        Stopped: a stop was requested; all runs are saved.
    """
    from pipeline.plan.pack import runs_that_fit
    from pipeline.training.packed.pack import train_pack

    plan = read_json(folder / PLAN, "Start it by the command that trains several runs, such as `compare`.")
    if not isinstance(plan, dict) or not isinstance(plan.get("runs"), list):
        raise RunFolderError(str(folder / PLAN), None, "is no list of runs", "Start the comparison again.")
    runs: list[tuple[RunConfig, Path]] = []
    for name in plan["runs"]:
        run_dir = folder / str(name)
        config = load_saved(RunPaths(run_dir).config, trusted)
        if not is_trained(RunPaths(run_dir), config):
            runs.append((config, run_dir))
    if runs:
        largest = max(runs, key=lambda run: run[0].adapter.rank * run[0].train.micro_batch)[0]
        at_once = plan.get("at_once") or runs_that_fit(largest)
        ended = train_pack(runs, load_saved(RunPaths(folder).config, trusted), at_once, trusted)
        if stopped := [one for one in ended if one.state == "stopped"]:
            raise Stopped(f"stopped with {len(stopped)} of {len(ended)} trainings left; the same command continues")
