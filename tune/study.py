"""The search as Ray Tune sees it: which trial comes next, which one stops early, what is written down.

The ledger is the only state. Ray's searcher, scheduler and callback interfaces are thin views of it.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.tune as ray_tune
from ray.tune.search import Searcher

from pipeline import ADAPTER_WEIGHTS, RunConfig, RunPaths, dump_config, manifest_faults, sha256_file
from tune.cluster import Capacity, attached_to
from tune.dimensions import Values, point_key
from tune.ledger import Ledger, TrialRecord, pending
from tune.pack import run_packed, start_workers
from tune.progress import SearchProgress
from tune.sampling import suggest
from tune.scheduling import make_scheduler
from tune.space import Arm, trial_config
from tune.stopping import Stopping
from tune.trial import TRIALS, Assignment, PackMaker, TrainFunction, ended_mark, run_trial

TRIES = 3
"""Starts of a trial on an attached cluster whose process is lost there, as with its machine. On one machine a process
is killed for lack of memory, and would be again. Tune counts a loss twice where two of its calls end with it, and gives
up a trial that it was about to hand to the process that is lost: it is given room, the callback counts, and what Tune
gave up is run once it has ended."""


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
            pack=self._free_pack(name) if packed else "", packs=self.capacity.packs,
        )  # fmt: skip
        assignment.ended.unlink(missing_ok=True)
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


class StudyCallback(ray_tune.Callback):
    """Writes what happens into the ledger and shows it."""

    def __init__(
        self, ledger: Ledger, progress: SearchProgress, folder: Path, stopping: Stopping, tries: int = TRIES
    ) -> None:
        """`tries`: starts of a trial whose process is lost."""
        self.ledger, self.progress, self.folder, self.stopping = ledger, progress, folder, stopping
        self.tries, self.losses = tries, Counter[str]()
        self.given_up = set[str]()
        """Trials lost that Tune does not start again, although they have starts left."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A validation, or the final scores."""
        name = trial.config["name"]
        if self.ledger.trials[name].state != "running":
            return  # it was lost after its last word, and has nothing to add
        if "failed" in result:
            if not self.stopping.requested:
                self._end(name, state="failed", error=result["failed"])
            return
        row = {"step": result["step"], "nll": result["nll"], "accuracy": result["accuracy"]}
        self.ledger.append("report", trial=name, **row)
        if result["finished"]:
            self._end(name, state="done", adapter_sha256=result["adapter_sha256"])
        else:
            self.progress.validated(self.ledger.trials[name])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Ended: by itself (then its result has been recorded) or stopped early by the scheduler.

        One that was stopped because it overfits delivers what it would have: the best adapter that it had.
        """
        record = self.ledger.trials[trial.config["name"]]
        if record.state != "running" or self.stopping.requested:
            return
        adapter = RunPaths(self.folder / TRIALS / record.name).adapter
        if record.overfits and not manifest_faults(adapter):
            self._end(record.name, state="done", adapter_sha256=sha256_file(adapter / ADAPTER_WEIGHTS))
        else:
            self._end(record.name, state="stopped")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Its process was lost, with its machine perhaps: Tune starts it again, where there is room."""
        record = self.ledger.trials[trial.config["name"]]
        if self._lost(record, lambda: f"was lost {self.tries} times (its process, or its machine)"):
            self.ledger.append(
                "start", trial=record.name, arm=record.arm, index=record.index, values=record.values,
                config_sha256=record.config_sha256,
            )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Its process was lost, and Tune has done with it: the others go on."""
        record = self.ledger.trials[trial.config["name"]]
        if self._lost(record, lambda: _error_text(trial)):
            self.given_up.add(record.name)

    def _lost(self, record: TrialRecord, error: Callable[[], str]) -> bool:
        """Whether a trial whose process was lost has a start left; where it has none, it ends with `error`."""
        if record.state != "running" or self.stopping.requested:
            return False
        self.losses[record.name] += 1
        if self.losses[record.name] >= self.tries:
            self._end(record.name, state="failed", error=error())  # Tune may start it once more: it finds this mark
            return False
        self.progress.lost(record)
        return True

    def _end(self, name: str, **outcome: Any) -> None:
        self.ledger.append("end", trial=name, **outcome)
        mark = ended_mark(self.folder / TRIALS / name)
        mark.parent.mkdir(parents=True, exist_ok=True)  # a trial may have failed before it made anything
        mark.touch()
        if outcome["state"] != "failed":  # what its adapter and predictions do not hold would only fill the disk
            shutil.rmtree(RunPaths(self.folder / TRIALS / name).checkpoints, ignore_errors=True)
        self.progress.ended(self.ledger.trials[name])


def _error_text(trial: Any) -> str:
    """What the trial's other processes said (`TrialCrashed`), else the end of what Ray says."""
    text = Path(trial.error_file).read_text(encoding="utf-8").strip() if trial.error_file else "no reason given"
    _, said, message = text.rpartition("TrialCrashed: ")
    if said:
        return message.strip()
    if "Worker exit type" in text:
        return "its process died without a word (killed, for lack of memory?)"
    return text.splitlines()[-1]


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
    function = run_packed if workers else functools.partial(run_trial, train=train)
    callback = StudyCallback(study.ledger, progress, study.folder, stopping, TRIES if attached_to() else 1)
    while study.queue:
        _run_queue(study, function, callback, storage)
        left = pending(study.ledger, study.arms)
        study.queue = [(arm, index) for arm, index in left if arm.trial_name(index) in callback.given_up]
        callback.given_up.clear()
    for worker in workers:
        ray.kill(worker)


def _run_queue(study: Study, function: Callable[..., Any], callback: StudyCallback, storage: Path) -> None:
    """All trials of the queue, by one run of Tune."""
    ray_tune.Tuner(
        ray_tune.with_resources(function, study.capacity.trial_resources()),
        tune_config=ray_tune.TuneConfig(
            search_alg=StudySearcher(study),
            scheduler=make_scheduler(study.config, study.arms, study.ledger, study.folder),
            num_samples=len(study.queue),
            max_concurrent_trials=study.capacity.concurrent,
            # A trial that trains has a process of its own: nothing leaks from one to the next. A client has no state.
            reuse_actors=bool(study.capacity.packs),
        ),
        run_config=ray_tune.RunConfig(
            name="study",
            storage_path=str(storage),
            verbose=0,
            stop=StopOnSignal(callback.stopping),
            failure_config=ray_tune.FailureConfig(max_failures=2 * callback.tries if callback.tries > 1 else 0),
            callbacks=[callback],
        ),
    ).fit()


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
