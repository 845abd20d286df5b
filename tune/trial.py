"""One trial: the function that Ray Tune runs, in a process of its own. (Those that are packed: `tune/pack`.)

    SEARCH/trials/trial_000/        an ordinary run folder
    SEARCH/trials/trial_000.log     what its processes printed

The configuration is resolved once, by the driver, and travels as text with its hash; the trial checks
that the run folder it leaves behind holds exactly that configuration.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from pipeline import (
    EXIT_STOPPED,
    LAUNCHER_VARIABLES,
    LoradropError,
    RunConfig,
    RunPaths,
    StageFailed,
    build_config,
    claim,
    load_config,
    open_append,
)
from tune.cluster import CONTROLLER_CPUS

TRIALS = "trials"

START_ATTEMPTS = 3
"""Times a TorchTrainer may wait in vain (a minute each) for the workers it was promised."""

TrainFunction = Callable[[RunConfig, Path, Callable[[dict[str, Any]], None]], dict[str, Any]]
"""`pipeline.train_run`: (config, run folder, on_validation) -> final scores."""
PackMaker = Callable[[RunConfig, bool], Any]
"""`pipeline.Pack`: (configuration whose base and rows all share, whether code that comes with the model may run)."""
Report = Callable[[dict[str, Any]], None]


class TrialFailed(Exception):
    """Carries a trial's error to the driver as text: an error with its own signature does not survive pickling."""


class TrialCrashed(Exception):
    """One of a trial's processes ended, and what the others say is a consequence: Tune starts the trial again."""


@dataclass(frozen=True)
class Assignment:
    """What a trial is told; plain values, so that any process of a cluster can read it."""

    name: str
    folder: str
    """The search folder; every node must see it."""
    working_folder: str
    """Where relative paths of the configuration start."""
    config: str
    """The resolved configuration as YAML."""
    config_sha256: str
    workers: int
    """Processes of the trial."""
    gpus: int
    """Accelerators of each process, 0 or 1."""
    pack: str = ""
    """The worker that trains it, by name; none: the trial's own processes do."""
    packs: tuple[str, ...] = ()
    """All workers: where that one does not come back, another takes the run over."""

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.folder) / TRIALS / self.name

    @property
    def ended(self) -> Path:
        """A file that the driver leaves once the trial has ended: Tune starts again what dies after its last word."""
        return ended_mark(self.run)

    def to_dict(self) -> dict[str, Any]:
        """The form in which Ray carries it."""
        return asdict(self)


def ended_mark(run: Path) -> Path:
    """Beside the run folder, as the lock is."""
    return run.with_name(f".{run.name}.ended")


def run_trial(given: dict[str, Any], train: TrainFunction | None = None) -> None:
    """Train one configuration and report each validation to Tune.

    Args:
        given: `Assignment.to_dict()`.
        train: Stands in for `pipeline.train_run` in tests.

    Raises:
        TrialCrashed: one of several processes was lost.
    """
    import ray.tune as ray_tune

    assignment = Assignment(**given)
    if assignment.ended.exists():
        ray_tune.report(NOTHING_MORE)
        return
    try:
        if assignment.workers == 1:
            _run_worker(assignment, train, ray_tune.report)
        else:
            _run_group(assignment, train)
    except TrialFailed as error:
        ray_tune.report(failure(str(error)))


NOTHING_MORE = {"step": 0, "nll": math.inf, "accuracy": None, "finished": True}
"""What a trial reports that had ended before; its end is in the ledger."""


def failure(text: str) -> dict[str, Any]:
    """How a trial that has failed tells so. An exception would be one of Ray's to Tune: for it, trials start again."""
    return {"step": 0, "nll": math.inf, "accuracy": None, "finished": False, "failed": text}


def _run_group(assignment: Assignment, train: TrainFunction | None) -> None:
    """Several processes: a TorchTrainer inside the Tune function; every worker trains, rank 0's reports count."""
    import ray.train
    from ray.train.torch import TorchTrainer  # imports torch: never in the driver
    from ray.tune.integration.ray_train import TuneReportCallback

    from tune.workers import OwnRendezvous

    trainer = TorchTrainer(
        lambda: _run_worker(assignment, train, ray.train.report),
        torch_config=OwnRendezvous(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=assignment.workers,
            use_gpu=assignment.gpus > 0,
            resources_per_worker={"CPU": 1 - CONTROLLER_CPUS, "GPU": assignment.gpus},
        ),
        run_config=ray.train.RunConfig(
            name=assignment.name,
            storage_path=str(Path(assignment.folder) / ".ray" / "train"),
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(controller_failure_limit=START_ATTEMPTS),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures: dict[int, Any] = getattr(error, "worker_failures", {})
        causes = [getattr(failures[rank], "_base_exc", failures[rank]) for rank in sorted(failures)]
        if said := [cause for cause in causes if isinstance(cause, TrialFailed)]:
            raise said[0] from None
        raise TrialCrashed(error_text(causes[0] if causes else error)) from None


def _run_worker(assignment: Assignment, train: TrainFunction | None, report: Report) -> None:
    """One process of a trial: prepare the folder, train, check, report."""
    if assignment.workers == 1:
        for name in LAUNCHER_VARIABLES:  # of a launcher that the driver was started under
            os.environ.pop(name, None)
    process_rank = int(os.environ.get("RANK", "0"))
    os.chdir(assignment.working_folder)
    print_to(assignment.run.with_name(f"{assignment.name}{f'.rank{process_rank}' if process_rank else ''}.log"))
    try:
        with _alone(assignment.run, process_rank):
            _check_devices(assignment)
            _train(assignment, train, report)
    except Exception as error:
        if isinstance(error, LoradropError) and error.exit_code == EXIT_STOPPED:
            return  # the scheduler asked for it
        traceback.print_exc()
        sys.stderr.flush()
        lost = assignment.workers > 1 and not isinstance(error, LoradropError)  # a peer, for all that is known here
        raise (TrialCrashed if lost else TrialFailed)(error_text(error)) from None


def _train(assignment: Assignment, stand_in: TrainFunction | None, report: Report) -> None:
    if stand_in is None:
        from pipeline import train_run  # imports torch
    train: TrainFunction = stand_in or train_run
    config = build_config(yaml.safe_load(assignment.config))
    require_hash(assignment, config.sha256(), "reached the trial")
    reporter = Reporter(assignment, report)
    reporter.finished(train(config, assignment.run, reporter.validated))


class Reporter:
    """Tells Tune what a trial would deliver if it ended now: the validation of the adapter that is published."""

    def __init__(self, assignment: Assignment, report: Report) -> None:
        self._assignment, self._report = assignment, report
        self._last_step = build_config(yaml.safe_load(assignment.config)).train.max_steps
        self._standing: dict[str, Any] = {}

    def validated(self, row: dict[str, Any]) -> None:
        """A validation, as `train_run` tells of it. Raises `StageFailed` where it is not finite."""
        if not math.isfinite(row["nll"]):
            raise StageFailed(f"validation NLL is {row['nll']} at step {row['step']}")
        if not self._standing or row["published"]:
            self._standing.update(nll=row["nll"], accuracy=row.get("accuracy"))
        # The last validation is reported with the result, once the adapter is written.
        if row["step"] < self._last_step:
            self._report({"step": int(row["step"]), **self._standing, "finished": False})

    def finished(self, result: dict[str, Any]) -> None:
        """The end, as `train_run` returns it. Raises `StageFailed` where something else was trained."""
        trained = load_config(RunPaths(self._assignment.run).config).sha256()
        require_hash(self._assignment, trained, "was trained")
        self._report({
            "step": result["steps"], "nll": result["validation_nll"], "accuracy": result["validation_accuracy"],
            "adapter_sha256": result["adapter_sha256"], "finished": True,
        })  # fmt: skip


def require_hash(assignment: Assignment, sha256: str, what: str) -> None:
    """Raises `StageFailed` where a configuration is not the trial's."""
    if sha256 != assignment.config_sha256:
        raise StageFailed(f"{assignment.name}: another configuration than the chosen one {what}")


def _check_devices(assignment: Assignment) -> None:
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if assignment.workers == 1 and assignment.gpus and len(visible) != assignment.gpus:
        raise StageFailed(f"{assignment.name}: sees the devices {visible}, but was given {assignment.gpus}")


@contextmanager
def _alone(run: Path, process_rank: int) -> Iterator[None]:
    """Rank 0 empties the run folder, once no process of a killed earlier attempt can still write to it."""
    if process_rank:
        yield
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    with open_append(run.with_name(f".{run.name}.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it back when the holder dies
        shutil.rmtree(run, ignore_errors=True)
        claim(run, "run")
        yield


def print_to(path: Path) -> IO[bytes]:
    """Send this process's output, of C++ code too, to a file that outlives Ray's session."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_append(path)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    return file


def error_text(error: BaseException) -> str:
    """One error for people, whatever Ray has wrapped it in."""
    cause = getattr(error, "cause", None)  # Ray wraps what a worker raised
    if isinstance(cause, Exception):
        error = cause
    text = str(error) or repr(error)
    return text if isinstance(error, (LoradropError, TrialFailed, TrialCrashed)) else f"{type(error).__name__}: {text}"
