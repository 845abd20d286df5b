"""The comparison of methods: train each at each setting, predict with all of them at once, report.

Every training is a run of its own (`trainings/`). They share a base where one device trains them and nothing speaks
against it (`pipeline.config.pack`); the others are started and continued as `loradrop train` does it. What the base
model cannot honour is found before the first one starts; a training that fails does not stop the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, dump_config
from pipeline.config.pack import pack_refusal
from pipeline.data.splits import load_splits
from pipeline.distributed.devices import accelerator_memory
from pipeline.distributed.nodes import owned_folders
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER, RunFolderError, StageFailed
from pipeline.files import read_json, write_text
from pipeline.run_folder.belongs import holds_trainings, refuse_other
from pipeline.run_folder.chain import is_trained
from pipeline.run_folder.comparison import (
    REFUSALS,
    TRAININGS,
    Training,
    choose,
    outcome,
    plan_trainings,
    read_comparison,
    shared_part,
    values_text,
    with_loss,
    write_comparison,
)
from pipeline.run_folder.paths import Folders, RunPaths, update_status
from pipeline.stages.pack import write_plan
from pipeline.stages.processes import begin_training, headline, start
from pipeline.terminal import duration, one_line, say

CHECK, PACK = "method_check", "pack"
_POLL_SECONDS = 2.0


def run_comparison(config: RunConfig, folders: Folders) -> int:
    """Train, evaluate and report the methods of `config.compare`; the same command continues where it was stopped.

    Returns 0 where every training is in the table, 1 where one failed, 2 where a method was refused.

    Raises:
        StageFailed: no training succeeded.
    """
    here, started = Folders(folders.comparison), time.monotonic()
    paths, planned = RunPaths(here.run), plan_trainings(config)
    if holds_trainings(here.run / TRAININGS):
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
    """Run what is not done yet: together what can share a base (`pipeline.stages.pack`), the rest one after another;
    compare.json says after each how it ended.

    Args:
        shared: the comparison's own configuration: its data, its label, by what validation chooses.
    """
    before = {one.name for one in read_comparison(RunPaths(folder)) or [] if one.packed}
    found = [replace(one, packed=one.name in before) for one in trainings]
    progress = _Trainings(found, configs, folder, shared)
    code = train_together(progress)
    if code == EXIT_STOPPED:
        return progress.found, code
    for i, own in enumerate(configs):
        if progress.found[i].state != "waiting":
            continue
        run, started = folder / progress.found[i].run, time.monotonic()
        if progress.is_done(i):  # by an earlier start of the command
            begin_training(own, run)
            progress.ended(i, EXIT_OK)
            continue
        progress.headline(f"{i + 1}/{len(configs)} {_shown(progress.found[i])}", range(i, len(configs)))
        code = start("train", own, Folders(run))
        if code == EXIT_STOPPED:
            return progress.found, code
        progress.ended(i, code)
        progress.clock.add(time.monotonic() - started, own.train.max_steps)
    rows = load_splits(shared.data).validation
    found = choose([with_loss(one, folder, rows, shared.select.by) for one in progress.found])
    write_comparison(RunPaths(folder), shared.label, found)
    states = {one.state for one in found}
    return found, EXIT_FAILED if "failed" in states else EXIT_USER if "refused" in states else EXIT_OK


def train_together(progress: _Trainings) -> int:
    """Train as one pack what is left and can share a base; the exit code of its process, 0 where none was started.

    What a pack did not get to, for want of memory say, is left waiting.
    """
    together = progress.packable()
    if len(together) < 2:
        return EXIT_OK
    folder, shared = progress.folder, progress.shared
    runs = [folder / progress.found[i].run for i in together]
    progress.headline(f"{len(together)} of {len(progress.found)} trainings, together on one base", together)
    started, code = time.monotonic(), EXIT_OK
    with owned_folders(runs, PACK, None):
        for i, run in zip(together, runs, strict=True):
            begin_training(progress.configs[i], run)
            progress.found[i] = replace(progress.found[i], packed=True)
            update_status(RunPaths(run), "train", "starting", config_sha256=progress.configs[i].training_sha256())
        write_plan(folder, [run.relative_to(folder) for run in runs])
        with progress.watching(together):
            code = start(PACK, shared, Folders(folder))
    for i in together:
        if progress.is_done(i) or _status(RunPaths(folder / progress.found[i].run)).get("state") == "failed":
            progress.ended(i, EXIT_OK if progress.is_done(i) else EXIT_FAILED)
    steps = sum(progress.configs[i].train.max_steps for i in together if progress.found[i].state == "done")
    progress.clock.add(time.monotonic() - started, steps)
    return code


class _Trainings:
    """What has become of the trainings so far, in compare.json as well."""

    def __init__(
        self, found: list[Training], configs: Sequence[RunConfig], folder: Path, shared: RunConfig
    ) -> None:
        self.found, self.configs, self.folder, self.shared = found, configs, folder, shared
        self.clock = Clock()

    def is_done(self, i: int) -> bool:
        """Whether the run folder holds the end of this very training."""
        return is_trained(RunPaths(self.folder / self.found[i].run), self.configs[i])

    def packable(self) -> list[int]:
        """Those that are left and can be trained in one process on the one device there is."""
        launch = self.shared.launch
        if launch.processes or launch.nodes > 1 or launch.hostfile or len(accelerator_memory()) > 1:
            return []
        left = [i for i, one in enumerate(self.found) if one.state == "waiting" and not self.is_done(i)]
        return [i for i in left if not pack_refusal(self.shared, self.configs[i])]

    def headline(self, text: str, ahead: Iterable[int]) -> None:
        """What starts now, and how long what is ahead will take."""
        left = [i for i in ahead if self.found[i].state == "waiting" and not self.is_done(i)]
        headline(f"{text}{self.clock.left(sum(self.configs[i].train.max_steps for i in left))}")

    def ended(self, i: int, code: int) -> None:
        """A training has ended."""
        one = self.found[i]
        self.found[i] = outcome(one, self.folder) if code == EXIT_OK else _failed(one, self.folder, code)
        write_comparison(RunPaths(self.folder), self.shared.label, self.found)

    @contextmanager
    def watching(self, together: Sequence[int]) -> Iterator[None]:
        """Meanwhile, those of a pack that end well are recorded as they do."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_POLL_SECONDS):
                for i in together:
                    if self.found[i].state != "waiting" or not self.is_done(i):
                        continue
                    with suppress(RunFolderError):  # it is looked at again when the pack has ended
                        self.ended(i, EXIT_OK)
                        say(f"done: {_shown(self.found[i])}")

        watcher = threading.Thread(target=watch, daemon=True, name="pack-watch")
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


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


def _shown(training: Training) -> str:
    return f"{training.method}, {values_text(training.values)}, seed {training.seed}"


def _status(paths: RunPaths) -> dict[str, Any]:
    return dict(read_json(paths.status).get("train", {})) if paths.status.exists() else {}


def _failed(training: Training, folder: Path, code: int) -> Training:
    paths = RunPaths(folder / training.run)
    status = _status(paths)
    error = status.get("detail") if status.get("state") == "failed" else None
    log = paths.root / "logs" / "train.log"
    return replace(training, state="failed", error=error or f"ended with exit code {code}; see {log}")
