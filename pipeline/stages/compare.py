"""The comparison of methods: train each at each setting, predict with all of them at once, report.

Every training is a run of its own (`trainings/`), started and continued as `loradrop train` does it. What the base
model cannot honour is found before the first one starts; a training that fails does not stop the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config import RunConfig, dump_config
from pipeline.data.splits import load_splits
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER, StageFailed
from pipeline.files import read_json, write_text
from pipeline.run_folder.chain import is_trained
from pipeline.run_folder.comparison import (
    REFUSALS,
    Training,
    choose,
    outcome,
    plan_trainings,
    shared_part,
    values_text,
    with_loss,
    write_comparison,
)
from pipeline.run_folder.paths import Folders, RunPaths, refuse_other
from pipeline.stages.processes import headline, start
from pipeline.terminal import duration, one_line, say

CHECK = "method_check"


def run_comparison(config: RunConfig, folders: Folders) -> int:
    """Train, evaluate and report the methods of `config.compare`; the same command continues where it was stopped.

    Returns 0 where every training is in the table, 1 where one failed, 2 where a method was refused.

    Raises:
        StageFailed: no training succeeded.
    """
    here, started = Folders(folders.comparison), time.monotonic()
    paths, planned = RunPaths(here.run), plan_trainings(config)
    refuse_other(paths.config, config, shared_part)
    write_text(paths.config, dump_config(config))
    trainings = [training for training, _ in planned]
    if not all(is_trained(RunPaths(here.run / one.run), own) for one, own in planned):
        if code := start(CHECK, config, here):
            return code
        trainings = mark_refused(trainings, read_json(here.run / REFUSALS))
    trainings, code = train_all(trainings, [own for _, own in planned], here.run, config)
    if code == EXIT_STOPPED:
        return code
    if not any(one.state == "done" for one in trainings):
        first = next(one for one in trainings if one.error)
        raise StageFailed(f"no training of the comparison succeeded; the first, {first.name}, said: {first.error}")
    for stage in ("evaluate", "report"):
        if stage_code := start(stage, config, here):
            return stage_code
    print_comparison(here.run, time.monotonic() - started)
    return code


def train_all(
    trainings: Sequence[Training], configs: Sequence[RunConfig], folder: Path, shared: RunConfig
) -> tuple[list[Training], int]:
    """Run what is not done yet, one after another; compare.json says after each how it ended.

    Args:
        shared: the comparison's own configuration: its data, its label, by what validation chooses.
    """
    found, paths, clock = list(trainings), RunPaths(folder), Clock()
    for i, (training, own) in enumerate(zip(trainings, configs, strict=True)):
        if training.state == "refused":
            continue
        waiting = sum(
            its.train.max_steps
            for one, its in zip(found[i:], configs[i:], strict=True)
            if one.state == "waiting" and not is_trained(RunPaths(folder / one.run), its)
        )
        headline(f"{i + 1}/{len(found)} {training.method}, {values_text(training.values)}{clock.left(waiting)}")
        started, was_done = time.monotonic(), is_trained(RunPaths(folder / training.run), own)
        code = start("train", own, Folders(folder / training.run))
        if code == EXIT_STOPPED:
            return found, code
        found[i] = outcome(training, folder) if code == EXIT_OK else _failed(training, folder, code)
        write_comparison(paths, shared.label, found)
        if not was_done:
            clock.add(time.monotonic() - started, own.train.max_steps)
    rows = load_splits(shared.data).validation
    found = choose([with_loss(one, folder, rows, shared.select.by) for one in found])
    write_comparison(paths, shared.label, found)
    states = {one.state for one in found}
    return found, EXIT_FAILED if "failed" in states else EXIT_USER if "refused" in states else EXIT_OK


class Clock:
    """The time left, from the trainings of this sitting: some are longer than others, so it goes by steps."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0

    def add(self, seconds: float, steps: int) -> None:
        """Count a training that ran from its start (or its newest checkpoint) to its end."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + steps

    def left(self, steps: int) -> str:
        """For people; empty while nothing is known."""
        if not self._steps or not steps:
            return ""
        return f" (about {duration(steps * self._seconds / self._steps)} of training left)"


def mark_refused(trainings: Sequence[Training], refusals: dict[str, str]) -> list[Training]:
    """The trainings, those of refused methods marked; every refusal is shown."""
    for method, error in refusals.items():
        say(one_line(f"left out: {method}: {error}"))
    return [
        replace(one, state="refused", error=refusals[one.method]) if one.method in refusals else one
        for one in trainings
    ]


def print_comparison(folder: Path, seconds: float) -> None:
    """The table, what is missing in it, and where the rest lies."""
    from pipeline.report.comparison import format_comparison

    print(format_comparison(read_json(RunPaths(folder).result)))
    print(f"\nfinished in {duration(seconds)}\n  report   {one_line(os.path.relpath(folder / 'report.html'))}")


def _failed(training: Training, folder: Path, code: int) -> Training:
    paths = RunPaths(folder / training.run)
    status = read_json(paths.status).get("train", {}) if paths.status.exists() else {}
    error = status.get("detail") if status.get("state") == "failed" else None
    log = paths.root / "logs" / "train.log"
    return replace(training, state="failed", error=error or f"ended with exit code {code}; see {log}")
