"""The stage that trains a list of runs on one base: what a comparison starts for its trainings.

On a GPU one process trains them. On CPUs there are as many processes as `train` has, each with its part of the runs and
of the cores, and a base of its own: two processes of one thread lose less to waiting than one process of two.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from pipeline.config.launch import LaunchConfig
from pipeline.config.run import RunConfig
from pipeline.distributed import lifeline
from pipeline.distributed.launcher import has_accelerator, process_count
from pipeline.distributed.worker import stage_main
from pipeline.errors import EXIT_OK, EXIT_STOPPED, RunFolderError, StageFailed, Stopped
from pipeline.files import read_json, write_json
from pipeline.run_folder.chain import is_trained
from pipeline.run_folder.paths import RunPaths, load_saved
from pipeline.training.packed.standing import Standing, shown

PLAN = "pack.json"
"""In the folder that holds the runs: which of them share a pack."""
_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Part:
    """What one process trains."""

    runs: Sequence[str]
    """Run folders, relative to the folder of the plan."""
    at_once: int | None
    """How many may share the pack; None = as many as fit."""
    processes: int
    """How many share the machine's memory."""


def write_plan(folder: Path, runs: list[Path], at_once: int | None = None) -> None:
    """Say which run folders, whose config.yaml's are written, the stage is to train.

    Args:
        runs: relative to `folder`, in the order in which they are admitted.
        at_once: how many may share the pack of a process; None = as many as fit.
    """
    write_json(folder / PLAN, {"runs": [str(run) for run in runs], "at_once": at_once})


def pack_stage(folder: Path, trusted: bool = False) -> None:
    """Train what pack.json of the folder says and is not trained yet; each run's status.json says how it ended.

    The base and the rows are those of the folder's own config.yaml. A run that fails does not stop the others.

    Raises:
        RunFolderError: there is no such plan.
        StageFailed: one of several processes failed; what it has not trained is left.
        Stopped: a stop was requested; all runs are saved.
    """
    plan = read_json(folder / PLAN, "Start it by the command that trains several runs, such as `compare`.")
    if not isinstance(plan, dict) or not isinstance(plan.get("runs"), list):
        raise RunFolderError(str(folder / PLAN), None, "is no list of runs", "Start the comparison again.")
    left = {str(name): config for name in plan["runs"] if (config := _untrained(folder / str(name), trusted))}
    if not left:
        return
    names, show = list(left), shown(sum(config.train.max_steps for config in left.values()))
    count = _process_count(len(names))
    parts = [Part(names[first::count], plan.get("at_once"), count) for first in range(count)]
    if count == 1:
        _train(folder, parts[0], trusted, show)
    else:
        _train_side_by_side(folder, parts, trusted, show)


def _untrained(run_dir: Path, trusted: bool) -> RunConfig | None:
    config = load_saved(RunPaths(run_dir).config, trusted)
    return None if is_trained(RunPaths(run_dir), config) else config


def _process_count(runs: int) -> int:
    return 1 if has_accelerator() else min(process_count(LaunchConfig()), _threads(), runs)


def _threads() -> int:
    """Of all processes together."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdigit() and int(asked) else os.cpu_count() or 1


def _train(folder: Path, part: Part, trusted: bool, show: Callable[[Standing], None]) -> None:
    """Raises `Stopped`."""
    from pipeline.plan.pack import runs_that_fit
    from pipeline.training.packed.pack import train_pack

    runs = [(load_saved(RunPaths(folder / name).config, trusted), folder / name) for name in part.runs]
    largest = max(runs, key=lambda run: run[0].adapter.rank * run[0].train.micro_batch)[0]
    at_once = part.at_once or runs_that_fit(largest, part.processes)
    ended = train_pack(runs, load_saved(RunPaths(folder).config, trusted), at_once, trusted, show)
    if stopped := [one for one in ended if one.state == "stopped"]:
        raise Stopped(f"stopped with {len(stopped)} of {len(ended)} trainings left; the same command continues")


def _train_side_by_side(
    folder: Path, parts: Sequence[Part], trusted: bool, show: Callable[[Standing], None]
) -> None:
    """Raises `Stopped` or `StageFailed`."""
    spawn = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(_threads() // len(parts))
    lifeline.work_begins()  # of the processes, which save where they stand: this one waits for them
    processes, standings = [], dict[Connection, Standing | None]()
    for number, part in enumerate(parts):
        here, there = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_work_on, args=(folder, number, part, trusted, there), name=f"pack-{number}")
        process.start()
        there.close()
        processes.append(process)
        standings[here] = None
    working, told = set(standings), False
    while working:
        for end in [end for end in wait(list(working), _POLL_SECONDS) if isinstance(end, Connection)]:
            try:
                standings[end] = end.recv()
            except EOFError:  # it has ended
                working.discard(end)
        known = [standing for standing in standings.values() if standing is not None]
        if len(known) == len(parts):
            show(sum(known[1:], known[0]))
        if lifeline.stop_asked() and not told:
            told = True
            for process in processes:
                process.terminate()
    for process in processes:
        process.join()
    codes = {process.exitcode for process in processes} - {EXIT_OK}
    if codes and codes <= ({EXIT_STOPPED, -signal.SIGTERM} if told else {EXIT_STOPPED}):
        raise Stopped("stopped; the same command continues")
    if codes:
        raise StageFailed(f"a process of the pack ended with exit code {codes.pop()}; what it has not trained is left")


def _work_on(folder: Path, number: int, part: Part, trusted: bool, end: Connection) -> None:
    """A process of its own: one part."""
    sys.exit(stage_main(f"pack-{number}", lambda folder: _train(folder, part, trusted, end.send), folder))
