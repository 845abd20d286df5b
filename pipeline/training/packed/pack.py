"""A pack: one process, one device, one base, and runs that are admitted and leave at any step."""

from __future__ import annotations

import contextlib
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.adapters.attach import remove
from pipeline.adapters.build import admit_adapter, open_slots
from pipeline.config import RunConfig, TrainConfig
from pipeline.config.pack import pack_refusal
from pipeline.data.cache import lengths_of
from pipeline.data.splits import load_splits
from pipeline.distributed import lifeline
from pipeline.distributed.world import lone_world
from pipeline.errors import ConfigError, LoradropError, Stopped, file_fault
from pipeline.files import write_json
from pipeline.loss.consistency import TrainingObjective
from pipeline.model.head import check_packing
from pipeline.prediction.task import open_task, training_examples
from pipeline.run_folder.chain import Origin
from pipeline.run_folder.paths import RunPaths, update_status
from pipeline.terminal import say
from pipeline.training.batch import choose_rows
from pipeline.training.engine import micro_steps_of
from pipeline.training.environment import describe_environment
from pipeline.training.loader import open_loader
from pipeline.training.loop import Endings, Lane, train_step
from pipeline.training.loss_scale import LossScale
from pipeline.training.packed.budget import PassBudget
from pipeline.training.packed.engine import StackedEngine
from pipeline.training.packed.standing import Standing, shown
from pipeline.training.repair import make_up_validation, restore_best
from pipeline.training.run import OnValidation, Run
from pipeline.training.schedule import require_steps


@dataclass(frozen=True)
class Ended:
    """How a run in a pack has ended."""

    run_dir: Path
    state: Literal["done", "stopped", "failed"]
    result: dict[str, Any] | None = None
    """What `train_run` returns, where it is done."""
    error: Exception | None = None
    """What it failed with, or `Stopped`."""


class Pack:
    """Runs that share the passes of one base. Each writes the run folder that it would write alone."""

    def __init__(self, config: RunConfig, trusted: bool = False) -> None:
        """Load the base and the rows of config.model and config.data; config.adapter and config.train are not read.

        Args:
            trusted: whether code that comes with the model may run.

        Raises:
            ConfigError, DataError: as `train_run`; a base that computes in float16.
        """
        self.config = config.trusting(trusted).model_copy(update={"train": TrainConfig()})
        self.world = lone_world()
        self.splits = load_splits(config.data)
        say(f"loading the base model {config.model.path}")
        self.task = open_task(self.config, self.splits, self.world.device)
        base = self.task.base
        if base.compute_dtype == torch.float16:
            raise ConfigError(
                "model.compute_dtype", "float16", "needs a loss scale, which one backward pass of many runs has not",
                "Set model.compute_dtype=bfloat16 or float32, or train the runs one by one.",
            )
        self.examples = training_examples(self.task, self.splits.train, config.data)
        self.adapters = open_slots(base)
        longest = max(lengths_of(self.examples))
        self._padded_because = choose_rows(self.adapters, config.model.attention, longest)
        self.adapters.model.train()
        self.engine = StackedEngine(TrainingObjective(self.task.objective(), self.adapters.axis), self.adapters)
        self.budget = PassBudget(self.world.device.type != "cpu")
        self._lanes: dict[Path, Lane] = {}

    @property
    def runs(self) -> int:
        """How many are active."""
        return len(self._lanes)

    @property
    def steps_left(self) -> int:
        """Of all active runs."""
        return sum(lane.train.max_steps - lane.run.counters.step for lane in self._lanes.values())

    def admit(self, config: RunConfig, run_dir: Path, on_validation: OnValidation | None = None) -> None:
        """Take a run in; it takes part from the next step on, and continues where its checkpoints end.

        Raises:
            ConfigError, DataError, RunFolderError: as `train_run`; a run that cannot share passes.
            Stopped: a stop was requested before its first step.
        """
        if run_dir in self._lanes:
            raise LoradropError(f"{run_dir} is in training already")
        if reason := pack_refusal(self.config, config):
            raise ConfigError("--run-dir", str(run_dir), f"cannot join a pack: {reason}", "Train it by itself.")
        require_steps(config.train)
        micro_steps_of(config.train, self.world)  # refuses what does not divide
        if config.train.packing and self._padded_because:
            check_packing(self.task.base.model, config.model.attention)
        task = replace(self.task, label_smoothing=config.train.label_smoothing)  # type: ignore[type-var]
        task.objective()  # refuses what has no meaning for it
        run_dir.mkdir(parents=True, exist_ok=True)
        adapter = admit_adapter(self.adapters, config.adapter, config.train.max_steps, config.train.seed)
        try:
            self._lanes[run_dir] = self._start(config, RunPaths(run_dir), task, adapter, on_validation)
        except BaseException as error:
            self._release(adapter)
            if not isinstance(error, Stopped):
                _record_failure(RunPaths(run_dir), error)
            raise

    def _start(
        self, config: RunConfig, paths: RunPaths, task: Any, adapter: int, on_validation: OnValidation | None
    ) -> Lane:
        train, fingerprint = config.train, self.splits.fingerprint
        if train.activation_checkpointing:  # changes no result; from the first run on that asks for it
            self.adapters.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        slot = self.engine.open_slot(adapter, train)
        origin = Origin(config.training_sha256(), fingerprint)
        run = Run(
            config, origin, paths, self.world, task, self.adapters, self.examples, self.splits.validation,
            on_validation, slot,
        )  # fmt: skip
        loader = open_loader(
            train, config.data.max_tokens, self.examples, run.spec, end_to_end=self.adapters.end_to_end
        )
        run.record_start(self._environment())
        try:
            run.resume()
            run.begin()
            make_up_validation(run)
        except BaseException:
            run.metrics.close()
            raise
        return Lane(run, self.engine, loader, 1, LossScale((), torch.float32), shown=False)

    def advance(self) -> list[Ended]:
        """One optimizer step of every active run; those that have ended with it, and left."""
        ended = [self._conclude(lane) for lane in self._complete()]
        if lanes := list(self._lanes.values()):
            found = self._step(lanes)
            ended += [self._end(lane, error) for lane, error in found.items()]
            ended += [self._conclude(lane) for lane in self._complete()]
        return ended

    def _step(self, lanes: list[Lane]) -> Endings:
        """One step of all, with passes as large as memory allows."""
        known = self.budget.settled
        while True:
            try:
                found = train_step(self.engine, lanes, self.budget)
            except torch.cuda.OutOfMemoryError:  # of a pass: nothing has been updated
                if not self.budget.shrink():
                    raise
                self.engine.forget_gradients()
                torch.cuda.empty_cache()
            else:
                if self.budget.settled and not known:
                    for lane in lanes:
                        write_json(lane.run.paths.environment, self._environment())
                return found

    def _environment(self) -> dict[str, Any]:
        identity = self.task.base.identity.as_dict()
        pass_ = {"places": self.budget.places, "settled": self.budget.settled}
        return {**describe_environment(identity, self.splits.fingerprint, 1), "shared_pass": pass_}

    def close(self) -> None:
        """Let go of all runs as they stand: their checkpoints are theirs to continue from."""
        for lane in list(self._lanes.values()):
            lane.run.metrics.close()
            self._leave(lane)

    def _complete(self) -> list[Lane]:
        return [lane for lane in self._lanes.values() if lane.run.over]

    def _conclude(self, lane: Lane) -> Ended:
        """The end of a run that has no step left."""
        run = lane.run
        try:
            run.metrics.close()
            restore_best(run)
            result = run.finish()
        except Exception as error:
            return self._end(lane, error)
        self._leave(lane)
        return Ended(run.paths.root, "done", result)

    def _end(self, lane: Lane, error: Exception) -> Ended:
        """The end of a run before its last step."""
        run = lane.run
        with contextlib.suppress(Exception):  # it has an error already
            run.metrics.close()
        self._leave(lane)
        if isinstance(error, Stopped):
            return Ended(run.paths.root, "stopped", error=error)
        _record_failure(run.paths, error)
        return Ended(run.paths.root, "failed", error=error)

    def _leave(self, lane: Lane) -> None:
        del self._lanes[lane.run.paths.root]
        self._release(lane.run.slot.adapter)

    def _release(self, adapter: int) -> None:
        remove(self.adapters, adapter)
        self.engine.close_slot()


def train_pack(
    runs: Sequence[tuple[RunConfig, Path]], shared: RunConfig, at_once: int | None = None,
    trusted: bool = False, on_step: Callable[[Standing], None] | None = None,
) -> list[Ended]:
    """Train a list of runs, `at_once` of them in a pack (None = all); the next is admitted as soon as one has left.

    Where the process is asked to stop, all are saved, and those that have not begun are `stopped`, too.

    Args:
        on_step: is told after every step how far they are; None = a line on the terminal.
    """
    pack, waiting, ended = Pack(shared, trusted), deque(runs), list[Ended]()
    show = on_step or shown(sum(config.train.max_steps for config, _ in runs))
    while waiting or pack.runs:
        while waiting and pack.runs < (at_once or len(runs)) and not lifeline.stop_asked():
            config, run_dir = waiting.popleft()
            try:
                pack.admit(config, run_dir)
            except Exception as error:
                ended.append(Ended(run_dir, "stopped" if isinstance(error, Stopped) else "failed", error=error))
        ended += pack.advance()
        left = sum(config.train.max_steps for config, _ in waiting) + pack.steps_left
        show(Standing(left, pack.runs, len(waiting)))
        if lifeline.stop_asked() and not pack.runs:
            return [*ended, *(Ended(run_dir, "stopped") for _, run_dir in waiting)]
    pack.close()
    return ended


def _record_failure(paths: RunPaths, error: BaseException) -> None:
    """The failure in status.json and for people, as a run alone leaves it."""
    if isinstance(error, OSError):
        error = file_fault(error) or error
    if isinstance(error, LoradropError):
        message = str(error)
    else:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    say(f"{paths.root.name}: {message}")
    with contextlib.suppress(OSError, LoradropError):  # where the disk still takes it
        update_status(paths, "train", "failed", message)
