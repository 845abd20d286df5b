"""Which trials of a search end before their last step: those that lag behind, and those that overfit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipeline import EarlyExitConfig, RunConfig, RunFolderError, RunPaths, read_metrics, write_json
from tune.ledger import Ledger
from tune.space import Arm, ArmName, validation_steps
from tune.trial import TRIALS

REDUCTION = 2
"""Asynchronous successive halving (arXiv 1810.05934): at each rung the worse half stops."""


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
        self.lost: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A new trial, or one that was lost and begins again: it is at no rung twice, and can finish as before."""
        super().on_trial_add(tune_controller, trial)
        if trial.trial_id in self.lost:
            self.lost.discard(trial.trial_id)
            self.can_finish += 1 + (trial.config["name"] in self.asked)
            self.asked.discard(trial.config["name"])

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
        """A failed trial cannot finish either, unless it begins again."""
        self.lost.add(trial.trial_id)
        self.can_finish -= 1
        super().on_trial_error(tune_controller, trial)


class EarlyExit:
    """Asks trials that overfit to end (`search.early_exit`), by the metrics in their run folders.

    ALTO's rule (arXiv 2604.05426): validation NLL above `factor` times the smoothed training loss, `validations` times
    in a row. Ours adds that none of these is a new best: a trial that still gets better goes on.
    """

    def __init__(
        self, rule: EarlyExitConfig, ledger: Ledger, folder: Path, request_stop: Callable[[str], None]
    ) -> None:
        self._rule, self._ledger, self._folder, self._request_stop = rule, ledger, folder, request_stop

    def look_at(self, name: str) -> None:
        """After a validation; the ledger has it that the trial overfits, before it is asked to stop."""
        if self._rule.factor is None or self._ledger.trials[name].overfits:
            return
        metrics = RunPaths(self._folder / TRIALS / name).metrics
        try:
            rows = list(read_metrics(metrics, train=["loss"], validation=["nll"]))
        except RunFolderError:  # half a line: it is being written
            return
        if overfits(rows, self._rule):
            self._ledger.append("overfits", trial=name)
            self._request_stop(name)


def overfits(rows: Iterable[Mapping[str, Any]], rule: EarlyExitConfig) -> bool:
    """Whether the rows of a metrics.jsonl, in their order, end in as many signs of overfitting as the rule wants.

    The training loss is smoothed as s_t = (1 - w) * sum_k w^k * loss_(t-k), over 1 - w^t.
    """
    total, weight, best, signs = 0.0, 0.0, float("inf"), 0
    for row in rows:
        if row["kind"] == "train":
            total = rule.smoothing * total + (1.0 - rule.smoothing) * row["loss"]
            weight = rule.smoothing * weight + (1.0 - rule.smoothing)
        elif row["kind"] == "validation":
            above = weight > 0.0 and rule.factor is not None and row["nll"] > rule.factor * total / weight
            signs = signs + 1 if above and row["nll"] >= best else 0
            best = min(best, row["nll"])
    return signs >= rule.validations


class ArmScheduler(FIFOScheduler):
    """A scheduler per arm: a trial lags behind, or not, among those of its own arm alone."""

    def __init__(self, schedulers: Mapping[str, EnsembleASHA], ledger: Ledger, early_exit: EarlyExit) -> None:
        """
        Args:
            schedulers: of the arms, by name.
        """
        super().__init__()
        self._schedulers, self._ledger, self._early_exit = schedulers, ledger, early_exit

    def _of(self, trial: Any) -> EnsembleASHA:
        return self._schedulers[self._ledger.trials[trial.config["name"]].arm]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """To the trial's arm, as all below."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """As `EnsembleASHA`, which comes first; a trial that it lets go on is asked to end where it overfits."""
        one, name = self._of(trial), trial.config["name"]
        if "failed" in result:
            one.on_trial_error(tune_controller, trial)
            return str(TrialScheduler.CONTINUE)
        decision = one.on_trial_result(tune_controller, trial, result)
        if name not in one.asked and not result["finished"]:
            self._early_exit.look_at(name)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """As `EnsembleASHA`."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """As `EnsembleASHA`."""
        self._of(trial).on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """As `EnsembleASHA`."""
        self._of(trial).on_trial_error(tune_controller, trial)


def make_scheduler(config: RunConfig, arms: Sequence[Arm], ledger: Ledger, folder: Path) -> ArmScheduler:
    """The arms' schedulers, with what an interrupted search has seen. Each arm keeps as many trials to their end: plain
    LoRA, which needs no ensemble, is chosen among as many as the method.
    """
    search = config.search
    first_rung = validation_steps(config.train.validate_every_steps, search.max_steps)

    def request_stop(name: str) -> None:
        write_json(RunPaths(folder / TRIALS / name).stop_request, {"by": "search"})

    schedulers: dict[str, EnsembleASHA] = {}
    for arm in arms:
        one = EnsembleASHA((first_rung, search.max_steps), arm.trials, search.adapters, request_stop)
        one.replay(ledger, arm.name)
        schedulers[arm.name] = one
    return ArmScheduler(schedulers, ledger, EarlyExit(search.early_exit, ledger, folder, request_stop))
