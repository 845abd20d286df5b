"""One run in progress: where it stands, its validation, what it saves, how it resumes and stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from pipeline.adapters.attach import Adapters, is_linear, linear_shape
from pipeline.adapters.heads import head_state
from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import adapter_matrices, write_adapter
from pipeline.config import RunConfig
from pipeline.data.encode import Encoded
from pipeline.data.rows import Row
from pipeline.distributed import lifeline, zero
from pipeline.distributed.world import World, agree, barrier, gather_objects
from pipeline.errors import DiskFull, RunFolderError, Stopped
from pipeline.files import (
    ADAPTER_WEIGHTS,
    MANIFEST,
    manifest_faults,
    publish_folder,
    read_json,
    read_json_lines,
    remove_asides,
    sha256_file,
    write_json,
)
from pipeline.prediction.predict import predict_shared, validation_scores
from pipeline.prediction.task import Task
from pipeline.run_folder.metrics import Metrics, open_loggers
from pipeline.run_folder.paths import RunPaths, update_status
from pipeline.run_folder.predictions import Member as PredictedMember
from pipeline.run_folder.predictions import Predictions, write_members, write_predictions
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
from pipeline.training.engine import trained_parameters
from pipeline.training.guards import Guards, StepNumbers, recent_losses
from pipeline.training.rank_budget import RankBudget
from pipeline.training.throughput import Meter, Work

OnValidation = Callable[[dict[str, float]], None]


@dataclass
class Run:
    """One run in progress: what the loop needs at hand, and where it stands."""

    config: RunConfig
    paths: RunPaths
    world: World
    task: Task
    adapters: Adapters
    examples: Sequence[Encoded]
    validation_rows: list[Row]
    on_validation: OnValidation | None
    engine: Any = None
    scores: dict[str, float] = field(default_factory=dict)
    """The last validation."""

    def __post_init__(self) -> None:
        self.counters = Counters(0, self.config.train.seed, self.config.result_sha256())
        self.saved = self.counters
        self.metrics = Metrics(self.paths.metrics, self.world.is_main)
        self.trained = trained_parameters(self.adapters)
        schedule = self.adapters.specs[0].schedule
        self.budget = RankBudget(self.adapters.layers, schedule, self.config.train.max_gradient_norm)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.counters.step % every == 0 or self.counters.step == self.config.train.max_steps

    def validate(self) -> None:
        """Mean-field scores on the validation split; saves, and publishes the adapter, if it is the best so far.

        Raises:
            Stopped: a stop was requested meanwhile; a resumed run validates first.
        """
        step, best = self.counters.step, self.counters.best_validation_nll
        try:
            predictions = predict_shared(
                self.task, self.adapters, self.validation_rows, [Member(0)], self.world, stop_asked=self.stop_asked
            )
        except Stopped:
            self.stop()
        self.scores = validation_scores(predictions, self.validation_rows)
        self.metrics.write("validation", step=step, **self.scores)
        self.counters = replace(self.counters, validated_step=step)
        if self.budget.supersedes(step, self.counters.best_step or 0):
            best = None
        published = best is None or self.scores["nll"] < best or not self.config.train.keep_best
        if published:
            self.counters = replace(self.counters, best_step=step, best_validation_nll=self.scores["nll"])
            self.save()  # first: what is published is then never ahead of what a resume knows
            self.publish_adapter(predictions)
        if self.on_validation is not None:
            self.on_validation({"step": float(step), **self.scores, "published": float(published)})

    def publish_adapter(self, predictions: Predictions) -> None:
        """adapter/ in PEFT format, and the validation predictions that go with it."""
        adapters = self.adapters
        matrices = adapter_matrices(adapters.layers, 0, zero.full_fp32)  # a collective
        head = head_state(adapters.heads, 0, zero.full_fp32)  # another one
        spec, base = adapters.specs[0], self.task.base.identity.resolved

        def fill(folder: Path) -> None:
            write_adapter(folder, matrices, spec, adapters.layer_count, base, adapters.suffixes, head)
            write_json(folder / MANIFEST, {"step": self.counters.step, "validation_nll": self.scores["nll"]})

        def publish() -> None:
            (self.paths.predictions / "validation.npz").unlink(missing_ok=True)  # of the adapter before
            publish_folder(self.paths.adapter, fill)
            sha256 = sha256_file(self.paths.adapter / ADAPTER_WEIGHTS)
            member = PredictedMember("mean-field", "mean_field", str(self.paths.adapter), sha256)
            write_members(self.paths.predictions, [member])
            write_predictions(self.paths.predictions, "validation", predictions)

        self._main_writes(publish)

    def save(self) -> None:
        """Publish a checkpoint, unless this very state is saved."""
        if self.counters == self.saved:
            return
        state = collect_state(self.engine, self.trained, self.world.is_main)  # a collective
        state.update({f"budget/{name}": value for name, value in self.budget.state().items()})
        train = self.config.train

        def publish() -> None:
            self.metrics.sync()
            save_checkpoint(
                self.paths.checkpoints, state, self.counters, train.keep_checkpoints, train.checkpoint_bytes
            )

        self._main_writes(publish)
        self.saved = self.counters

    def resume(self) -> None:
        """Put the newest whole checkpoint into the engine, if there is one.

        Raises:
            RunFolderError: it is another run's.
        """
        found, faults = gather_objects(find_checkpoint(self.paths.checkpoints))[0]
        for fault in faults:
            say(fault, self.world.is_main)
        if found is not None:
            self.counters = load_checkpoint(found, self.engine, self.trained)
            self.budget.load_state(load_extra(found, "budget"))
            if self.counters.config_sha256 != self.config.result_sha256():
                remedy = "Give another --run-dir, or remove the folder."
                raise RunFolderError(str(found), None, "belongs to another configuration", remedy)
            say(f"continuing from {found.name}", self.world.is_main)
        self.saved = self.counters
        if self.world.is_main:
            tidy(self.paths.checkpoints, found)
            remove_asides(self.paths.root, "adapter|metrics\\.jsonl|environment\\.json")
            if found is not None:
                point(self.paths.checkpoints, self.counters)
        self.metrics.keep_until(self.counters.step, self.counters.validated_step == self.counters.step)
        if self.world.is_main:
            self.metrics.send_to(open_loggers(self.config, self.paths.root, self.counters.step))

    def begin(self) -> None:
        """The set-up is over: a stop is agreed on from here. Then what a stop or a crash cut off is made up for.

        Raises:
            Stopped: it was requested before.
        """
        self.stop_if_requested()
        lifeline.work_begins()
        step = self.counters.step
        if step and self.due(self.config.train.validate_every_steps):
            published = gather_objects(self.published_step())[0]
            behind = self.counters.best_step == step and published != step
            if behind or self.counters.validated_step != step:
                self.validate_again()

    def validate_again(self) -> None:
        """The validation of the step at which the run stands, as if for the first time."""
        step = self.counters.step
        if self.counters.best_step == step:  # known, but not published: better than itself once more
            self.counters = replace(self.counters, best_step=None, best_validation_nll=None)
        self.metrics.keep_until(step, validated=False)
        self.validate()
        self.save()

    def published_step(self) -> int | None:
        """The step of the adapter in adapter/; None where none is whole with its predictions."""
        if manifest_faults(self.paths.adapter) or not (self.paths.predictions / "validation.npz").exists():
            return None
        step: int | None = read_json(self.paths.adapter / MANIFEST).get("step")
        return step

    def restore_best(self) -> None:
        """Publish the best adapter from its checkpoint where adapter/ holds another: a crash or damage came between.

        Raises:
            RunFolderError: its checkpoint is gone, too.
        """
        best, published = self.counters.best_step, gather_objects(self.published_step())[0]
        if best is None or published == best:
            return
        folder = self.paths.checkpoints / f"step_{best:06d}"
        if manifest_faults(folder):
            raise RunFolderError(
                str(self.paths.adapter), None, f"is not that of the best step, {best}, and {folder.name} is damaged",
                "Remove the run folder and train again.",
            )
        final = self.counters
        load_checkpoint(folder, self.engine, self.trained)
        predictions = predict_shared(self.task, self.adapters, self.validation_rows, [Member(0)], self.world)
        self.counters = replace(final, step=best)
        self.scores = validation_scores(predictions, self.validation_rows)
        self.publish_adapter(predictions)
        self.counters = final

    def stop_asked(self) -> bool:
        """Whether this process was told to stop."""
        return lifeline.stop_asked(self.paths)

    def guards(self) -> Guards:
        """The checks before each update; they go on from the losses that metrics.jsonl holds."""
        rows, window = read_json_lines(self.paths.metrics), self.config.train.spike.window_steps
        losses = recent_losses(rows, self.counters.step, window)
        return Guards(self.engine, self.adapters, self.trained, self.config.train, self.paths, self.world, losses)

    def meter(self) -> Meter:
        """Counts what a step did."""
        head = getattr(self.task.base.model, "get_output_embeddings", lambda: None)()
        linears = [m for m in self.task.base.model.modules() if is_linear(m) and m is not head]
        work = Work(
            base=sum(math.prod(linear_shape(linear)) for linear in linears),
            adapter=sum(parameter.numel() for parameter in self.trained.values()),
            head=math.prod(linear_shape(head)) if head is not None else 0,
            recomputed=self.config.train.activation_checkpointing,
        )
        return Meter(work, self.world.device, self.task.base.identity.compute_dtype)

    def report_spike(self, numbers: StepNumbers) -> None:
        """One metrics row and one line, where the step's loss was a spike."""
        if numbers.spike is not None:
            step = self.counters.step
            self.metrics.write("spike", step=step, loss=numbers.loss, times_median=numbers.spike)
            text = f"step {step}: the loss {numbers.loss:.4g} is {numbers.spike:.1f} × its running median"
            say(text, self.world.is_main)

    def stop_if_requested(self) -> None:
        """Save and leave where any process sees the stop request. Raises `Stopped`."""
        done = self.counters.step == self.config.train.max_steps
        if agree(self.stop_asked(), self.world.device) and not done:
            self.stop()

    def stop(self) -> NoReturn:
        """Save and leave; all processes have agreed on it. Raises `Stopped`."""
        self.save()
        if self.world.is_main:
            update_status(self.paths, "train", "stopped", f"at step {self.counters.step}")
            self.paths.stop_request.unlink(missing_ok=True)
        raise Stopped(f"stopped at step {self.counters.step}; the same command continues")

    def _main_writes(self, work: Callable[[], None]) -> None:
        """Let the main process write while all wait; a full disk stops all of them alike. Raises `DiskFull`."""
        said = None
        if self.world.is_main:
            try:
                work()
            except DiskFull as error:
                said = str(error)
        if said := gather_objects(said)[0]:
            raise DiskFull(said)

    def finish(self) -> dict[str, Any]:
        """Record the end; the best validation and the hash of the adapter that goes with it."""
        self.restore_best()
        barrier()
        best = [
            row
            for row in read_json_lines(self.paths.metrics)
            if row["kind"] == "validation" and row["step"] == self.counters.best_step
        ]
        if self.world.is_main:
            update_status(self.paths, "train", "done", f"{self.counters.step} steps, best at {self.counters.best_step}")
        return {
            "steps": self.counters.step,
            "best_step": self.counters.best_step,
            "validation_nll": self.counters.best_validation_nll,
            "validation_accuracy": best[-1].get("accuracy") if best else None,
            "adapter_sha256": sha256_file(self.paths.adapter / ADAPTER_WEIGHTS),
        }
