"""The search as Ray Tune sees it: which trial comes next, which one stops early, what is written down.

The ledger is the only state. Ray's searcher, scheduler and callback interfaces are thin views of it.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import ray.tune as ray_tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline import RunConfig, RunPaths, dump_config, write_json
from tune.cluster import Capacity
from tune.dimensions import Values, point_key
from tune.ledger import Ledger, pending
from tune.pack import start_workers
from tune.progress import SearchProgress
from tune.sampling import suggest
from tune.space import Arm, ArmName, trial_config, validation_steps
from tune.stopping import Stopping
from tune.trial import TRIALS, Assignment, PackMaker, TrainFunction, run_trial

REDUCTION = 2
"""Asynchronous successive halving (arXiv 1810.05934): at each rung the worse half stops."""


class Study:
    """Proposes trials and records what becomes of them."""

    def __init__(
        self, config: RunConfig, arms: Sequence[Arm], ledger: Ledger, folder: Path, capacity: Capacity
    ) -> None:
        self.config, self.arms, self.ledger, self.folder, self.capacity = config, arms, ledger, folder, capacity
        self.queue = pending(ledger, arms)
        self.packs: dict[str, str] = {}
        """Trials begun -> their workers."""

    def next_assignment(self) -> Assignment | None:
        """The next trial to run, recorded as started; None when all have been given out."""
        if not self.queue:
            return None
        arm, index = self.queue.pop(0)
        name = arm.trial_name(index)
        before = self.ledger.trials.get(name)
        values = before.values if before else self._new_values(arm, index)
        # The values may have been read from the folder, which has no say in this.
        packed = bool(self.capacity.packs)
        resolved = trial_config(arm.config, values, name, packed).trusting(self.config.model.trust_remote_code)
        assignment = Assignment(
            name=name, folder=str(self.folder), working_folder=os.getcwd(), config=dump_config(resolved),
            config_sha256=resolved.sha256(), workers=self.capacity.workers, gpus=self.capacity.gpus,
            pack=self._free_pack(name) if packed else "",
        )  # fmt: skip
        self.ledger.append(
            "start", trial=name, arm=arm.name, index=index, values=values, config_sha256=assignment.config_sha256
        )
        return assignment

    def _free_pack(self, name: str) -> str:
        """The worker with the fewest runs."""
        load = dict.fromkeys(self.capacity.packs, 0)
        for other, pack in self.packs.items():
            load[pack] += other != name and self.ledger.trials[other].state == "running"
        self.packs[name] = min(load, key=lambda pack: load[pack])
        return self.packs[name]

    def _new_values(self, arm: Arm, index: int) -> Values:
        taken = {point_key(record.values) for record in self.ledger.in_order(arm.name)}
        known = self.ledger.observations(arm.name)
        return suggest(arm.space, self.config.search.seed, index, arm.trials, known, taken)


class StudySearcher(Searcher):
    """Hands the study's assignments to Tune."""

    def __init__(self, study: Study) -> None:
        super().__init__(metric="nll", mode="min")
        self.study = study

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's assignment."""
        assignment = self.study.next_assignment()
        return Searcher.FINISHED if assignment is None else assignment.to_dict()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The ledger has it already."""


class EnsembleASHA(ASHAScheduler):
    """ASHA on validation NLL that leaves enough finished trials for the adapter ensemble.

    Rungs are met at min_steps · 2^k. A trial is stopped only while more than `keep` others can still finish.
    Stopping is a request that all processes of the trial agree on at their next step. Tune's own way, killing
    the trial function, would leave a nested TorchTrainer's workers and their reservation behind.
    """

    def __init__(self, steps: tuple[int, int], trials: int, keep: int, request_stop: Callable[[str], None]) -> None:
        """`steps`: those of the first rung, those of a whole trial."""
        super().__init__(
            time_attr="step", metric="nll", mode="min",
            max_t=steps[1], grace_period=min(steps), reduction_factor=REDUCTION,
        )  # fmt: skip
        self.can_finish, self.keep, self.request_stop = trials, keep, request_stop
        self.asked: set[str] = set()

    def replay(self, ledger: Ledger, arm: ArmName) -> None:
        """Meet the rungs with what an interrupted search already saw of an arm."""
        for record in ledger.in_order(arm):
            if not record.ended:
                continue
            stand_in: Any = SimpleNamespace(trial_id=record.name)
            self.on_trial_add(None, stand_in)
            for report in record.reports:
                super().on_trial_result(None, stand_in, report)
            self.can_finish -= record.state == "stopped"

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Always CONTINUE; a trial that lags behind is asked to end itself."""
        decision = super().on_trial_result(tune_controller, trial, result)
        name = trial.config["name"]
        lags = decision == TrialScheduler.STOP and not result["finished"]
        if lags and name not in self.asked and self.can_finish > self.keep:
            self.can_finish -= 1
            self.asked.add(name)
            self.request_stop(name)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A failed trial cannot finish either."""
        self.can_finish -= 1
        super().on_trial_error(tune_controller, trial)


class ArmScheduler(FIFOScheduler):
    """A scheduler per arm: a trial lags behind, or not, among those of its own arm alone."""

    def __init__(self, schedulers: Mapping[str, EnsembleASHA], arm_of: Callable[[str], str]) -> None:
        """
        Args:
            schedulers: of the arms, by name.
            arm_of: the arm of a trial, by its name.
        """
        super().__init__()
        self._schedulers, self._arm_of = schedulers, arm_of

    def _of(self, trial: Any) -> EnsembleASHA:
        return self._schedulers[self._arm_of(trial.config["name"])]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """To the trial's arm, as all below."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """As `EnsembleASHA`."""
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """As `EnsembleASHA`."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """As `EnsembleASHA`."""
        self._of(trial).on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """As `EnsembleASHA`."""
        self._of(trial).on_trial_error(tune_controller, trial)


class StudyCallback(ray_tune.Callback):
    """Writes what happens into the ledger and shows it."""

    def __init__(self, ledger: Ledger, progress: SearchProgress, folder: Path, stopping: Stopping) -> None:
        self.ledger, self.progress, self.folder, self.stopping = ledger, progress, folder, stopping

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A validation, or the final scores."""
        name = trial.config["name"]
        row = {"step": result["step"], "nll": result["nll"], "accuracy": result["accuracy"]}
        self.ledger.append("report", trial=name, **row)
        if result["finished"]:
            self._end(name, state="done", adapter_sha256=result["adapter_sha256"])
        else:
            self.progress.validated(self.ledger.trials[name])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Ended: by itself (then its result has been recorded) or stopped early by the scheduler."""
        record = self.ledger.trials[trial.config["name"]]
        if record.state != "running" or self.stopping.requested:
            return
        self._end(record.name, state="stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Failed: its error is kept, the others go on."""
        record = self.ledger.trials[trial.config["name"]]
        if record.state != "running" or self.stopping.requested:
            return
        self._end(record.name, state="failed", error=_error_text(trial))

    def _end(self, name: str, **outcome: Any) -> None:
        self.ledger.append("end", trial=name, **outcome)
        if outcome["state"] != "failed":  # what its adapter and predictions do not hold would only fill the disk
            shutil.rmtree(RunPaths(self.folder / TRIALS / name).checkpoints, ignore_errors=True)
        self.progress.ended(self.ledger.trials[name])


def _error_text(trial: Any) -> str:
    """What the trial said (`TrialFailed`), else the end of what Ray says."""
    text = Path(trial.error_file).read_text(encoding="utf-8").strip() if trial.error_file else "no reason given"
    _, said, message = text.rpartition("TrialFailed: ")
    if said:
        return message.strip()
    if "Worker exit type" in text:
        return "its process died without a word (killed, for lack of memory?)"
    return text.splitlines()[-1]


def make_scheduler(study: Study) -> ArmScheduler:
    """The arms' schedulers, with what an interrupted search has seen. Each arm keeps as many trials to their end: plain
    LoRA, which needs no ensemble, is chosen among as many as the method.
    """
    search = study.config.search
    first_rung = validation_steps(study.config.train.validate_every_steps, search.max_steps)

    def request_stop(name: str) -> None:
        write_json(RunPaths(study.folder / TRIALS / name).stop_request, {"by": "search"})

    schedulers: dict[str, EnsembleASHA] = {}
    for arm in study.arms:
        one = EnsembleASHA((first_rung, search.max_steps), arm.trials, search.adapters, request_stop)
        one.replay(study.ledger, arm.name)
        schedulers[arm.name] = one
    return ArmScheduler(schedulers, lambda name: study.ledger.trials[name].arm)


def run_study(
    study: Study,
    progress: SearchProgress,
    storage: Path,
    stopping: Stopping,
    train: TrainFunction | None,
    make_pack: PackMaker | None,
) -> None:
    """Run all open trials under Ray Tune; returns early when a stop is requested."""
    shared, trusted = dump_config(study.config), study.config.model.trust_remote_code
    workers = start_workers(study.capacity, shared, trusted, study.folder, make_pack)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(functools.partial(run_trial, train=train), study.capacity.trial_resources()),
        tune_config=ray_tune.TuneConfig(
            search_alg=StudySearcher(study),
            scheduler=make_scheduler(study),
            num_samples=len(study.queue),
            max_concurrent_trials=study.capacity.concurrent,
            reuse_actors=False,  # every trial has a process of its own: nothing leaks from one to the next
        ),
        run_config=ray_tune.RunConfig(
            name="study",
            storage_path=str(storage),
            verbose=0,
            stop=StopOnSignal(stopping),
            callbacks=[StudyCallback(study.ledger, progress, study.folder, stopping)],
        ),
    )
    tuner.fit()
    for worker in workers:
        ray.kill(worker)


class StopOnSignal(ray_tune.Stopper):
    """Asks Tune to end once a stop is requested."""

    def __init__(self, stopping: Stopping) -> None:
        self.stopping = stopping

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether to stop this trial."""
        return False

    def stop_all(self) -> bool:
        """Whether to stop everything."""
        return self.stopping.requested
