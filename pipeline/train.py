"""The training stage. `python -m pipeline.train --run-dir DIR` is what the DeepSpeed launcher starts."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.adapters.attach import Adapters
from pipeline.adapters.heads import head_state
from pipeline.adapters.layout import training_layout
from pipeline.adapters.members import Member
from pipeline.adapters.state import adapter_matrices, write_adapter
from pipeline.assembly import attach_adapter, build_engine, micro_steps_of, schedule_factor, trained_parameters
from pipeline.checkpoint import Counters, collect_state, find_checkpoint, load_checkpoint, save_checkpoint
from pipeline.config import RunConfig, TrainConfig, dump_config, load_config
from pipeline.data import load_splits
from pipeline.data.encode import Encoded
from pipeline.data.rows import Row
from pipeline.data.schedule import global_batch_indices, process_share
from pipeline.distributed import World
from pipeline.environment import describe_environment
from pipeline.errors import EXIT_STOPPED, LoradropError
from pipeline.objective import build_rows
from pipeline.predictions import Member as PredictedMember
from pipeline.predictions import Predictions, write_members, write_predictions
from pipeline.reader import Reader, open_reader
from pipeline.readout import predict_shared, validation_scores
from pipeline.runs import (
    ADAPTER_WEIGHTS,
    RunPaths,
    publish_folder,
    read_json_lines,
    sha256_file,
    update_status,
    write_json,
    write_text,
)
from pipeline.stage import stage_main
from pipeline.tracking import Metrics, Progress, say

OnValidation = Callable[[dict[str, float]], None]


class Stopped(LoradropError):
    """A stop was requested; everything is saved and the same command continues."""

    exit_code = EXIT_STOPPED


def train_run(config: RunConfig, run_dir: Path, on_validation: OnValidation | None = None) -> dict[str, Any]:
    """Train one adapter in this process (one of `world_size`), write the run folder, return the best validation.

    `on_validation` is told {"step", "nll", "accuracy"} on every process.

    Raises:
        ConfigError, DataError: the configuration does not fit the data, the model or the world.
        Stopped: a stop was requested and the state is saved.
    """
    world = distributed.start()
    distributed.require_equal("the configuration", config.sha256())
    paths = RunPaths(run_dir)
    micro_steps = micro_steps_of(config.train, world)
    splits = load_splits(config.data)
    say(f"loading the base model {config.model.path}", world.is_main)
    reader = open_reader(config, splits, world.device)
    examples = reader.examples(splits.train)
    adapters = attach_adapter(config, reader.base)
    run = Run(config, paths, world, reader, adapters, examples, splits.validation, on_validation)
    run.engine = build_engine(config, adapters, reader.objective(), micro_steps)
    if world.is_main:
        if not paths.config.exists():
            write_text(paths.config, dump_config(config))
        identity = reader.base.identity.as_dict()
        write_json(paths.environment, describe_environment(identity, splits.fingerprint, world.world_size))
        update_status(paths, "train", "running")
        describe(run, micro_steps)
    run.resume()
    training_loop(run, micro_steps)
    return run.finish()


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

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.counters.step % every == 0 or self.counters.step == self.config.train.max_steps

    def validate(self) -> None:
        """Mean-field scores on the validation split; publishes the adapter if it is the best so far."""
        predictions = predict_shared(self.reader, self.adapters, self.validation_rows, [Member(0)], self.world)
        self.scores = validation_scores(predictions, self.validation_rows)
        self.metrics.write("validation", step=self.counters.step, **self.scores)
        best = self.counters.best_validation_nll
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
            say(f"continuing from {found.name}", self.world.is_main)
        self.metrics.keep_until(self.counters.step)

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


def training_loop(run: Run, micro_steps: int) -> None:
    """Every optimizer step from where the run stands to train.max_steps."""
    train, world, engine, adapters = run.config.train, run.world, run.engine, run.adapters
    pad_id, side = run.reader.base.tokenizer.pad_token_id, run.reader.padding
    masked = any(site.rate > 0 for site in adapters.specs[0].sites)
    progress = Progress(train.max_steps, run.counters.step, world.is_main)
    for step in range(run.counters.step, train.max_steps):
        started = time.monotonic()
        learning_rate = set_learning_rate(engine, train, step)
        indices = global_batch_indices(len(run.examples), train.global_batch, step, train.seed)
        share = process_share(indices, world.process_rank, world.world_size)  # (position in the batch, row)
        own = [run.examples[row] for _, row in share]
        supervised, length = distributed.sum_over_processes(
            [sum(example.supervised for example in own), sum(len(example.input_ids) for example in own)], world.device
        )  # tokens of the global batch

        nll = 0.0
        for micro in range(micro_steps):
            part = slice(micro * train.micro_batch, (micro + 1) * train.micro_batch)
            positions = [position for position, _ in share[part]]
            layout = training_layout(positions, train.draws, train.draw_layout, masked)
            rows = build_rows(adapters, own[part], layout, pad_id, train.seed, step, side)
            with adapters.axis.active(rows.plan):  # recomputation in the backward pass reads the plan too
                loss = engine(**rows.tensors, row_weights=rows.weights)
                # The engine divides by accumulation steps and averages over processes. Both are undone, so that
                # the gradient is that of Σ nll / (supervised tokens of the global batch).
                engine.backward(loss * (micro_steps * world.world_size / supervised))
            engine.step()
            nll += float(loss.detach())

        mean_nll = distributed.sum_over_processes([nll], world.device)[0] / supervised
        if not math.isfinite(mean_nll):
            raise LoradropError(f"the loss is {mean_nll} at step {step + 1}; lower train.learning_rate")
        run.counters = replace(run.counters, step=step + 1)
        seconds = time.monotonic() - started
        run.metrics.write(
            "train",
            step=step + 1,
            loss=mean_nll,
            learning_rate=learning_rate,
            seconds=round(seconds, 4),
            gradient_norm=gradient_norm(engine),
            tokens_per_second=round(length / seconds, 1),
        )
        if run.due(train.validate_every_steps):
            run.validate()
        if run.due(train.checkpoint_every_steps):
            run.save()
        progress.show(step + 1, progress_parts(mean_nll, length / seconds, run.scores))
        run.stop_if_requested()
    progress.close()


def set_learning_rate(engine: Any, train: TrainConfig, step: int) -> float:
    """Set every group's rate for a 0-based step (lora_B's times the LoRA+ ratio); returns that of lora_A."""
    factor = schedule_factor(step, train.max_steps, train.warmup_fraction, train.schedule)
    for group in engine.optimizer.param_groups:
        group["lr"] = train.learning_rate * factor * group["ratio"]
    return train.learning_rate * factor


def gradient_norm(engine: Any) -> float | None:
    """Global gradient norm before clipping, where DeepSpeed reports it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def progress_parts(loss: float, tokens_per_second: float, scores: dict[str, float]) -> list[str]:
    """What the progress line says."""
    parts = [f"loss {loss:.4f}", f"{tokens_per_second:.0f} tokens/s"]
    if scores:
        parts.append("validation " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return parts


def describe(run: Run, micro_steps: int) -> None:
    """Say before the first step what is going to be trained, and on what."""
    train, identity = run.config.train, run.reader.base.identity
    trained = sum(parameter.numel() for parameter in run.trained.values())
    total = sum(len(example.input_ids) for example in run.examples)
    sites = ", ".join(f"{s.position} {s.rate:g}" for s in run.adapters.specs[0].sites if s.rate > 0) or "none"
    stage = run.engine.zero_optimization_stage()
    say(f"processes    {run.world.world_size} (DeepSpeed ZeRO-{stage}, {torch.get_num_threads()} threads each)")
    say(
        f"base         {identity.path}: {identity.parameters:,} parameters, {identity.quantized_modules}"
        f" {identity.quantization.upper()} modules, compute {identity.compute_dtype}"
    )
    head = f" and {', '.join(run.adapters.heads)}" if run.adapters.heads else ""
    say(f"adapter      {len(run.adapters.layers)} layers{head}, {trained:,} trainable parameters (fp32)")
    say(f"dropout      {sites}; {train.draws} draws per step, layout {train.draw_layout}")
    say(f"data         {len(run.examples)} rows, {total:,} tokens, {run.reader.supervision(run.examples)}")
    say(
        f"batch        {train.global_batch} = {train.micro_batch} × {micro_steps} accumulation × {run.world.world_size}"
    )


def train_stage(run_dir: Path) -> None:
    """Train what config.yaml of the run folder says."""
    try:
        train_run(load_config(RunPaths(run_dir).config), run_dir)
    finally:
        distributed.stop()


def main(argv: list[str] | None = None) -> int:
    """Entry point of every launched process."""
    return stage_main("train", train_stage, argv)


if __name__ == "__main__":
    sys.exit(main())
