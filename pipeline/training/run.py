"""One run in progress: where it stands, when things are due, how it validates, saves, resumes and stops.

It does not know whether its engine has other runs, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import RunConfig, dump_config
from pipeline.data.encode import Encoded
from pipeline.data.rows import Row
from pipeline.distributed import lifeline
from pipeline.distributed.world import World, agree, barrier, gather_objects
from pipeline.errors import RunFolderError, Stopped
from pipeline.files import ADAPTER_WEIGHTS, remove_asides, sha256_file, write_json, write_text
from pipeline.prediction.predict import predict_shared, validation_scores
from pipeline.prediction.task import Task
from pipeline.run_folder.chain import Origin
from pipeline.run_folder.listeners import Callback, Told
from pipeline.run_folder.metrics import Metrics, open_loggers, read_metrics
from pipeline.run_folder.paths import RunPaths, step_name, update_status
from pipeline.terminal import say
from pipeline.training.checkpoint import (
    Counters,
    collect_state,
    find_checkpoint,
    load_checkpoint,
    load_extra,
    point,
    save_checkpoint,
    tidy,
)
from pipeline.training.engine import Slot
from pipeline.training.published import Validation, main_writes, publish_adapter
from pipeline.training.rank_budget import RankBudget

OnValidation = Callable[[dict[str, float]], None]


@dataclass
class Run:
    """One run in progress: what the loop needs at hand, and where it stands."""

    config: RunConfig
    origin: Origin
    paths: RunPaths
    world: World
    task: Task
    adapters: Adapters
    examples: Sequence[Encoded]
    validation_rows: list[Row]
    on_validation: OnValidation | None
    slot: Slot
    """Its parameters in the engine."""
    callbacks: Sequence[Callback] = ()
    """Told by the main process."""
    scores: dict[str, float] = field(default_factory=dict)
    """The last validation."""

    def __post_init__(self) -> None:
        origin = self.origin.as_dict()
        self.counters = Counters(0, self.config.train.seed, **origin)
        self.saved = self.counters
        self.metrics = Metrics(self.paths.metrics, self.world.is_main)
        self.budget = RankBudget(self.adapters.layers, self.spec.schedule, self.config.train.max_gradient_norm)

    @property
    def spec(self) -> AdapterSpec:
        """What its adapter is."""
        return self.adapters.specs[self.slot.adapter]

    @property
    def out_of_patience(self) -> bool:
        """Whether `train.patience` ends the training. All processes agree: they have the same validations."""
        train, validated = self.config.train, self.counters.validated_step or 0
        if train.patience is None or self.budget.settles_after(validated):
            return False
        return self.counters.waited(train.validate_every_steps) >= train.patience

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        return self.counters.step >= self.config.train.max_steps or self.out_of_patience

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.counters.step % every == 0 or self.over

    def validation_of(self, step: int, stop_asked: Callable[[], bool] = lambda: False) -> Validation:
        """Mean-field scores on the validation split of what the engine holds, the state of `step`. A collective.

        Raises:
            Stopped: `stop_asked` said so meanwhile.
        """
        rows, members = self.validation_rows, [Member(self.slot.adapter)]
        predictions = predict_shared(self.task, self.adapters, rows, members, self.world, stop_asked=stop_asked)
        return Validation(step, validation_scores(predictions, rows), predictions)

    def validate(self) -> None:
        """Validate; save, and publish the adapter, if it is the best so far.

        Raises:
            Stopped: a stop was requested meanwhile; a resumed run validates first.
        """
        try:
            found = self.validation_of(self.counters.step, self.stop_asked)
        except Stopped:
            self.stop()
        self.take_validation(found)

    def take_validation(self, found: Validation) -> None:
        """Record a validation of the state that the engine holds; save, and publish it, if it is the best so far."""
        step, best = self.counters.step, self.counters.best_validation_nll
        self.scores = found.scores
        self.metrics.write("validation", step=step, **found.scores)
        afresh = self.budget.supersedes(step, self.counters.lowest_step or 0)
        self.counters = self.counters.validated(step, found.scores["nll"], afresh)
        if self.budget.supersedes(step, self.counters.best_step or 0):
            best = None
        published = best is None or found.scores["nll"] < best or not self.config.train.keep_best
        if published:
            self.counters = replace(self.counters, best_step=step, best_validation_nll=found.scores["nll"])
            self.save()  # first: what is published is then never ahead of what a resume knows
            self.publish(found)
        if self.out_of_patience and step < self.config.train.max_steps:
            lowest = self.counters.lowest_step
            self.metrics.write("ended", step=step, by="train.patience", lowest_step=lowest)
            say(f"step {step}: no lower validation NLL since step {lowest}, train.patience ends it", self.world.is_main)
        if self.on_validation is not None:
            self.on_validation({"step": float(step), **found.scores, "published": float(published)})

    def publish(self, found: Validation) -> None:
        """adapter/ as the engine holds it, with the validation that goes with it. A collective."""
        base = self.task.base.identity.resolved
        source = self.config.data.evaluation
        publish_adapter(self.adapters, self.slot, base, self.origin, found, self.paths, self.world, source)

    def save(self) -> None:
        """Publish a checkpoint, unless this very state is saved."""
        if self.counters == self.saved:
            return
        state = collect_state(self.slot, self.world.is_main)  # a collective
        state.update({f"budget/{name}": value for name, value in self.budget.state().items()})
        train = self.config.train

        def publish() -> None:
            self.metrics.sync()
            save_checkpoint(
                self.paths.checkpoints, state, self.counters, train.keep_checkpoints, train.checkpoint_bytes
            )

        main_writes(self.world, publish)
        self.saved = self.counters
        for callback in self.callbacks if self.world.is_main else ():
            callback.on_checkpoint(self.counters.step, self.paths.checkpoints / step_name(self.counters.step))

    def record_start(self, environment: dict[str, Any]) -> None:
        """Configuration, environment and status into the run folder. Main process only."""
        if not self.paths.config.exists():
            write_text(self.paths.config, dump_config(self.config))
        write_json(self.paths.environment, environment)
        update_status(self.paths, "train", "running", config_sha256=self.origin.config_sha256)

    def resume(self) -> None:
        """Put the newest whole checkpoint into the engine, if there is one.

        Raises:
            RunFolderError: it is another run's, or the data have changed since.
        """
        found, faults = gather_objects(find_checkpoint(self.paths.checkpoints))[0]
        for fault in faults:
            say(fault, self.world.is_main)
        if found is not None:
            self.counters = load_checkpoint(found, self.slot)
            self.budget.load_state(load_extra(found, "budget"))
            if different := self.origin.difference(asdict(self.counters)):
                remedy = "Put back what the run was started with, or give another --run-dir."
                raise RunFolderError(str(found), None, different, remedy)
            say(f"continuing from {found.name}", self.world.is_main)
        self.saved = self.counters
        if self.world.is_main:
            tidy(self.paths.checkpoints, found)
            remove_asides(self.paths.root, "adapter|metrics\\.jsonl|environment\\.json")
            if found is not None:
                point(self.paths.checkpoints, self.counters)
        self.metrics.keep_until(self.counters.step, self.counters.validated_step == self.counters.step)
        if self.world.is_main:
            shown = self.config.model_dump(mode="json")
            self.metrics.send_to(open_loggers(self.config.logging, shown, self.paths.root, self.counters.step))
            self.metrics.send_to([Told(self.callbacks)])

    def begin(self) -> None:
        """The set-up is over: a stop is agreed on from here. Raises `Stopped` where it was requested before."""
        self.stop_if_requested()
        lifeline.work_begins()

    def stop_asked(self) -> bool:
        """Whether this process was told to stop."""
        return lifeline.stop_asked(self.paths)

    def stop_if_requested(self) -> None:
        """Save and leave where any process sees the stop request. Raises `Stopped`."""
        if agree(self.stop_asked(), self.world.device) and not self.over:
            self.stop()

    def stop(self) -> NoReturn:
        """Save and leave; all processes have agreed on it. Raises `Stopped`."""
        self.save()
        if self.world.is_main:
            update_status(self.paths, "train", "stopped", f"at step {self.counters.step}")
            self.paths.stop_request.unlink(missing_ok=True)
        raise Stopped(f"stopped at step {self.counters.step}; the same command continues")

    def finish(self) -> dict[str, Any]:
        """Record the end; the best validation and the hash of the adapter that goes with it."""
        barrier()
        early = self.counters.step < self.config.train.max_steps
        best = [
            row
            for row in read_metrics(self.paths.metrics)
            if row["kind"] == "validation" and row["step"] == self.counters.best_step
        ]
        if self.world.is_main:
            detail = f"{self.counters.step} steps, best at {self.counters.best_step}"
            detail += ", ended by train.patience" if early else ""
            update_status(self.paths, "train", "done", detail, self.origin.config_sha256)
        return {
            "steps": self.counters.step,
            "ended_by": "train.patience" if early else None,
            "best_step": self.counters.best_step,
            "validation_nll": self.counters.best_validation_nll,
            "validation_accuracy": best[-1].get("accuracy") if best else None,
            "adapter_sha256": sha256_file(self.paths.adapter / ADAPTER_WEIGHTS),
        }


def validations_of(runs: Sequence[Run]) -> list[Validation]:
    """Of several runs with the same adapters and rows, in one prediction pass.

    Raises:
        Stopped: all of them were asked to stop meanwhile.
    """
    first, rows = runs[0], runs[0].validation_rows
    members = [Member(run.slot.adapter) for run in runs]

    def stop_asked() -> bool:
        return all(run.stop_asked() for run in runs)

    found = predict_shared(first.task, first.adapters, rows, members, first.world, stop_asked=stop_asked)
    own = ((run, found.of_members([m])) for m, run in enumerate(runs))
    return [Validation(run.counters.step, validation_scores(one, rows), one) for run, one in own]
