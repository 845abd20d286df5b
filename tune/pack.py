"""Trials that share a base: a worker process per device trains them together, a trial only passes on what it reports.

    PackWorker                      a Ray actor with a `pipeline.Pack`; it alone imports torch
    run_packed                      what Tune runs for a packed trial: a client of the worker
    SEARCH/trials/pack_0.log        what the worker printed

A worker that dies is started again by Ray, empty. Its trials admit their runs again, which continue from their own
checkpoints; Tune and the ledger do not notice. Where there is no room to start it again, as its machine has gone,
another worker takes the runs over.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ray
import ray.tune as ray_tune
import yaml

import pipeline
from pipeline import (
    EXIT_STOPPED,
    LAUNCHER_VARIABLES,
    LoradropError,
    RunConfig,
    RunPaths,
    build_config,
    claim,
    load_config,
    open_append,
    read_metrics,
    write_json,
)
from tune.cluster import Capacity
from tune.trial import (
    NOTHING_MORE,
    TRIALS,
    Assignment,
    PackMaker,
    Reporter,
    TrialFailed,
    error_text,
    failure,
    print_to,
    require_hash,
)

POLL_SECONDS = 10.0
"""A worker answers after that long also where there is nothing new."""
PAUSE_SECONDS = 0.5
PATIENCE_SECONDS = 300.0
"""How long a trial waits for a worker that has died to be there again."""
MOVE_SECONDS = 30.0
"""How long it waits before it asks another worker, where there is one: a process starts again in a few."""
LIVES = 3
"""Workers that may die under a trial between two of its validations."""


@dataclass
class Admitted:
    """A run as its worker knows it."""

    config: RunConfig
    folder: Path
    lock: IO[bytes]
    """Held while the run may write to its folder."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of its validations."""
    ended: tuple[str, Any] | None = None
    """(done, the result), (stopped, None) or (failed, what is said of it)."""


class PackWorker:
    """A thread of its own trains; the actor's threads, one per call, talk to the trials."""

    def __init__(self, shared: str, trusted: bool, working_folder: str, log: str, threads: int,
                 make_pack: PackMaker | None) -> None:
        """
        Args:
            shared: the search's configuration as YAML: its base and rows are every trial's.
            working_folder: where relative paths of the configuration start.
            log: takes what this process prints.
            threads: of torch.
            make_pack: stands in for `pipeline.Pack` in tests.
        """
        for name in LAUNCHER_VARIABLES:  # of a launcher that the driver was started under
            os.environ.pop(name, None)
        os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))  # before torch is loaded
        os.chdir(working_folder)
        print_to(Path(log))
        self._shared, self._trusted, self._make_pack = build_config(yaml.safe_load(shared)), trusted, make_pack
        self._pack: Any = None
        self._most = 1
        """Runs in the pack at once, once there is one: as many as its memory carries, where search.pack is auto."""
        self._runs: dict[str, Admitted] = {}
        self._waiting: list[str] = []
        self._changed, self._admitting = threading.Condition(), threading.Lock()
        threading.Thread(target=self._work, daemon=True, name="pack").start()

    def admit(self, given: dict[str, Any]) -> int:
        """Take a trial's run in, unless it is here already; the id of this process.

        What is wrong with it is told by `reports`.
        """
        assignment = Assignment(**given)
        with self._admitting:
            if assignment.name not in self._runs:
                run = _open(assignment)
                with self._changed:
                    self._runs[assignment.name] = run
                    if run.ended is None:
                        self._waiting.append(assignment.name)
                    self._changed.notify_all()
        return os.getpid()

    def reports(self, name: str, after: int) -> tuple[list[dict[str, Any]], tuple[str, Any] | None] | None:
        """The validations after a step, and how the run ended, if it has; None where this worker does not know it.

        Waits for news, `POLL_SECONDS` at most.
        """
        with self._changed:
            run = self._runs.get(name)
            if run is None:
                return None

            def news() -> list[dict[str, Any]]:
                return [row for row in run.rows if row["step"] > after]

            self._changed.wait_for(lambda: run.ended is not None or bool(news()), POLL_SECONDS)
            return news(), run.ended

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._training())
            try:
                while self._waiting and (self._pack is None or self._pack.runs < self._most):
                    self._let_in(self._runs[self._waiting.pop(0)])
                if self._training():
                    for ended in self._pack.advance():
                        self._let_out(ended.run_dir, ended.error or ended.result)
            except Exception as error:  # of the pack itself, for lack of memory say: the next run finds a new one
                with self._changed:
                    self._pack = None
                    self._waiting.clear()
                    for run in [run for run in self._runs.values() if run.ended is None]:
                        self._let_out(run.folder, error)

    def _training(self) -> bool:
        return self._pack is not None and self._pack.runs > 0

    def _let_in(self, run: Admitted) -> None:
        def on_validation(row: dict[str, Any]) -> None:
            with self._changed:
                run.rows.append(dict(row))
                self._changed.notify_all()

        try:
            if self._pack is None:
                self._most = self._fitting(run.config)
                self._pack = (self._make_pack or pipeline.Pack)(self._shared, self._trusted)  # imports torch
            self._pack.admit(run.config, run.folder, on_validation)
        except Exception as error:
            self._let_out(run.folder, error)

    def _fitting(self, config: RunConfig) -> int:
        asked = self._shared.search.pack
        if isinstance(asked, int) or self._make_pack is not None:
            return asked if isinstance(asked, int) else sys.maxsize
        fitting: int | None = pipeline.runs_that_fit(config)  # imports torch
        return sys.maxsize if fitting is None else fitting

    def _let_out(self, folder: Path, outcome: dict[str, Any] | Exception) -> None:
        """`outcome`: the result, or what ended the run before it."""
        ended: tuple[str, Any] = ("done", outcome)
        if isinstance(outcome, LoradropError) and outcome.exit_code == EXIT_STOPPED:
            ended = ("stopped", None)  # the scheduler asked for it
        elif isinstance(outcome, Exception):
            print(f"{folder.name}:", file=sys.stderr)
            traceback.print_exception(outcome)
            sys.stderr.flush()
            ended = ("failed", error_text(outcome))
        run = self._runs[folder.name]
        run.lock.close()
        with self._changed:
            run.ended = ended
            self._changed.notify_all()


def _open(assignment: Assignment) -> Admitted:
    """The run with its folder: emptied, unless it holds the beginning of this very run."""
    folder = assignment.run
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open_append(folder.with_name(f".{folder.name}.lock"))
    fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a worker that is dying
    config = build_config(yaml.safe_load(assignment.config))
    run = Admitted(config, folder, lock)
    try:
        require_hash(assignment, config.sha256(), "reached the worker")
        if _has_begun(RunPaths(folder), assignment.config_sha256):
            run.rows = _earlier_rows(RunPaths(folder), config.train.keep_best)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        claim(folder, "run")
    except LoradropError as error:
        run.ended = ("failed", error_text(error))
        lock.close()
    return run


def _has_begun(paths: RunPaths, config_sha256: str) -> bool:
    try:
        return paths.checkpoints.is_dir() and load_config(paths.config).sha256() == config_sha256
    except LoradropError:
        return False


def _earlier_rows(paths: RunPaths, keep_best: bool) -> list[dict[str, Any]]:
    """What a run that goes on has told before: a driver that is new has not heard it."""
    rows, best = list[dict[str, Any]](), float("inf")
    for row in read_metrics(paths.metrics, validation=["nll"]):
        if row["kind"] == "validation":
            rows.append({**row, "published": not keep_best or row["nll"] < best})
            best = min(best, row["nll"])
    return rows


def start_workers(
    capacity: Capacity, shared: str, trusted: bool, folder: Path, make_pack: PackMaker | None
) -> list[Any]:
    """One named worker per device; they live as long as what is returned is kept."""
    return [
        ray.remote(PackWorker)
        .options(
            name=name, num_cpus=capacity.worker_cpus, num_gpus=capacity.gpus, max_restarts=-1,
            max_concurrency=2 * capacity.concurrent + 8, scheduling_strategy="SPREAD",  # over the nodes of a cluster
        )
        .remote(shared, trusted, os.getcwd(), str(folder / TRIALS / f"{name}.log"), capacity.threads, make_pack)
        for name in capacity.packs
    ]  # fmt: skip


def run_packed(given: dict[str, Any]) -> None:
    """A trial whose run is in a worker, as Tune runs it: pass on what is reported, and end with the run.

    A run that failed, or whose worker died again and again or did not come back, is reported as such.

    Args:
        given: `Assignment.to_dict()`.
    """
    assignment = Assignment(**given)
    if assignment.ended.exists():
        ray_tune.report(NOTHING_MORE)
        return
    reporter = Reporter(assignment, ray_tune.report)
    try:
        _follow(assignment, reporter)
    except TrialFailed as error:
        ray_tune.report(failure(str(error)))
    except LoradropError as error:
        with suppress(OSError):  # its worker is to go on without it
            write_json(RunPaths(assignment.run).stop_request, {"by": assignment.name})
        ray_tune.report(failure(error_text(error)))


def _follow(assignment: Assignment, reporter: Reporter) -> None:
    names = [assignment.pack, *(name for name in assignment.packs if name != assignment.pack)]
    worker, lives = ray.get_actor(names[0]), set[int]()
    seen, admitted, answered = -1, False, time.monotonic()
    asked_since = answered
    while True:
        try:
            if not admitted:
                if len(lives) >= LIVES:
                    raise TrialFailed(f"the worker that trains it died {LIVES} times (killed, for lack of memory?)")
                lives.add(ray.get(worker.admit.remote(assignment.to_dict())))
                admitted = True
            found = ray.get(worker.reports.remote(assignment.name, seen))
        except ray.exceptions.RayActorError as error:
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise TrialFailed(f"the worker that trains it died and did not come back: {error}") from None
            admitted = False
            if len(names) > 1 and time.monotonic() - asked_since > MOVE_SECONDS:
                names.append(names.pop(0))
                worker, asked_since = ray.get_actor(names[0]), time.monotonic()
            time.sleep(PAUSE_SECONDS)
            continue
        answered = asked_since = time.monotonic()
        if found is None:  # the worker is another one
            admitted = False
            continue
        rows, ended = found
        for row in rows:
            seen, lives = int(row["step"]), set()
            reporter.validated(row)
        if ended is not None:
            state, told = ended
            if state == "failed":
                raise TrialFailed(told)
            if state == "done":
                reporter.finished(told)
            return
