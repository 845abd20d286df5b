"""One run in progress: where it stands, its validation, what it saves, how it resumes and stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import distributed
from pipeline.adapters.adalora_budget import RankBudget
from pipeline.adapters.attach import Adapters, is_linear, linear_shape
from pipeline.adapters.heads import head_state
from pipeline.adapters.members import Member
from pipeline.adapters.state import adapter_matrices, write_adapter
from pipeline.assembly import trained_parameters
from pipeline.checkpoint import Counters, collect_state, find_checkpoint, load_checkpoint, load_extra, save_checkpoint
from pipeline.config import RunConfig
from pipeline.data.encode import Encoded
from pipeline.data.rows import Row
from pipeline.distributed import World
from pipeline.errors import EXIT_STOPPED, LoradropError
from pipeline.guards import Guards, StepNumbers, recent_losses
from pipeline.loggers import open_loggers
from pipeline.predictions import Member as PredictedMember
from pipeline.predictions import Predictions, write_members, write_predictions
from pipeline.reader import Reader
from pipeline.readout import predict_shared, validation_scores
from pipeline.runs import ADAPTER_WEIGHTS, RunPaths, publish_folder, read_json_lines, sha256_file, update_status
from pipeline.throughput import Meter, Work
from pipeline.tracking import Metrics, say

OnValidation = Callable[[dict[str, float]], None]


class Stopped(LoradropError):
    """A stop was requested; everything is saved and the same command continues."""

    exit_code = EXIT_STOPPED


@dataclass
class Run:
    """One run in progress: what the loop needs at hand, and where it stands."""

    config: RunConfig
    paths: RunPaths
    world: World
    reader: Reader
    adapters: Adapters
    examples: list[Encoded]
    validation_rows: list[Row]
    on_validation: OnValidation | None
    engine: Any = None
    scores: dict[str, float] = field(default_factory=dict)
    """The last validation."""

    def __post_init__(self) -> None:
        self.counters = Counters(0, self.config.train.seed, self.config.sha256())
        self.metrics = Metrics(self.paths.metrics, self.world.is_main)
        self.trained = trained_parameters(self.adapters)
        schedule = self.adapters.specs[0].schedule
        self.budget = RankBudget(self.adapters.layers, schedule, self.config.train.max_gradient_norm)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.counters.step % every == 0 or self.counters.step == self.config.train.max_steps

    def validate(self) -> None:
        """Mean-field scores on the validation split; publishes the adapter if it is the best so far."""
        predictions = predict_shared(self.reader, self.adapters, self.validation_rows, [Member(0)], self.world)
        self.scores = validation_scores(predictions, self.validation_rows)
        self.metrics.write("validation", step=self.counters.step, **self.scores)
        best = self.counters.best_validation_nll
        if self.budget.supersedes(self.counters.step, self.counters.best_step or 0):
            best = None
        if best is None or self.scores["nll"] < best or not self.config.train.keep_best:
            self.counters = replace(self.counters, best_step=self.counters.step, best_validation_nll=self.scores["nll"])
            self.publish_adapter(predictions)
        if self.on_validation is not None:
            self.on_validation({"step": float(self.counters.step), **self.scores})

    def publish_adapter(self, predictions: Predictions) -> None:
        """adapter/ in PEFT format, and the validation predictions that go with it."""
        adapters = self.adapters
        matrices = adapter_matrices(adapters.layers, 0, distributed.full_fp32)  # a collective
        head = head_state(adapters.heads, 0, distributed.full_fp32)  # another one
        if not self.world.is_main:
            return
        spec, base = adapters.specs[0], self.reader.base.identity.resolved
        publish_folder(
            self.paths.adapter,
            lambda folder: write_adapter(folder, matrices, spec, adapters.layer_count, base, adapters.suffixes, head),
        )
        sha256 = sha256_file(self.paths.adapter / ADAPTER_WEIGHTS)
        member = PredictedMember("mean-field", "mean_field", str(self.paths.adapter), sha256)
        write_members(self.paths.predictions, [member])
        write_predictions(self.paths.predictions, "validation", predictions)

    def save(self) -> None:
        """Publish a checkpoint."""
        state = collect_state(self.engine, self.trained)  # a collective
        state.update({f"budget/{name}": value for name, value in self.budget.state().items()})
        if self.world.is_main:
            save_checkpoint(self.paths.checkpoints, state, self.counters, self.config.train.keep_checkpoints)
        distributed.barrier()

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        found, faults = find_checkpoint(self.paths.checkpoints)
        for fault in faults:
            say(fault, self.world.is_main)
        if found is not None:
            self.counters = load_checkpoint(found, self.engine, self.trained)
            self.budget.load_state(load_extra(found, "budget"))
            say(f"continuing from {found.name}", self.world.is_main)
        self.metrics.keep_until(self.counters.step)
        if self.world.is_main:
            self.metrics.send_to(open_loggers(self.config, self.paths.root, self.counters.step))

    def guards(self) -> Guards:
        """The checks before each update; they go on from the losses that metrics.jsonl holds."""
        rows, window = read_json_lines(self.paths.metrics), self.config.train.spike.window_steps
        losses = recent_losses(rows, self.counters.step, window)
        return Guards(self.engine, self.adapters, self.trained, self.config.train, self.paths, self.world, losses)

    def meter(self) -> Meter:
        """Counts what a step did."""
        head = getattr(self.reader.base.model, "get_output_embeddings", lambda: None)()
        linears = [m for m in self.reader.base.model.modules() if is_linear(m) and m is not head]
        work = Work(
            base=sum(math.prod(linear_shape(linear)) for linear in linears),
            adapter=sum(parameter.numel() for parameter in self.trained.values()),
            head=math.prod(linear_shape(head)) if head is not None else 0,
            recomputed=self.config.train.activation_checkpointing,
        )
        return Meter(work, self.world.device, self.reader.base.identity.compute_dtype)

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
        if not distributed.agree(self.paths.stop_request.exists(), self.world.device) or done:
            return
        self.save()
        if self.world.is_main:
            update_status(self.paths, "train", "stopped", f"at step {self.counters.step}")
            self.paths.stop_request.unlink(missing_ok=True)
        raise Stopped(f"stopped at step {self.counters.step}; the same command continues")

    def finish(self) -> dict[str, Any]:
        """Record the end; the best validation and the hash of the adapter that goes with it."""
        distributed.barrier()
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
