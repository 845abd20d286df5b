"""The training stage: one adapter, in one of the processes that the DeepSpeed launcher starts."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.adapters.build import attach_adapter
from pipeline.adapters.members import MaskKey
from pipeline.config import RunConfig, TrainConfig, dump_config
from pipeline.data.cache import lengths_of
from pipeline.data.splits import load_splits
from pipeline.distributed import zero
from pipeline.distributed.world import (
    leave_world,
    require_equal,
    require_shared_folder,
    start_world,
    sum_over_processes,
)
from pipeline.errors import Stopped
from pipeline.files import write_json, write_text
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.terms import GlobalMean
from pipeline.model.head import check_packing
from pipeline.prediction.task import open_task, training_examples, training_stream
from pipeline.run_folder.chain import Origin
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.paths import RunPaths, load_saved, update_status
from pipeline.terminal import Progress, say
from pipeline.training.batch import MemberBatch, lay_out
from pipeline.training.engine import build_engine, micro_steps_of
from pipeline.training.environment import describe_environment
from pipeline.training.guards import Guards, StepNumbers, recent_losses, require_same_inputs
from pipeline.training.loader import BatchLoader, StepBatch, open_loader
from pipeline.training.loss_scale import LossScale
from pipeline.training.repair import make_up_validation, restore_best
from pipeline.training.run import OnValidation, Run
from pipeline.training.schedule import require_steps, schedule_factor, warmup_steps
from pipeline.training.throughput import Meter, work_of


def train_run(config: RunConfig, run_dir: Path, on_validation: OnValidation | None = None) -> dict[str, Any]:
    """Train one adapter in this process (one of `world_size`), write the run folder, return the best validation.

    `on_validation` is told {"step", "nll", "accuracy", "published"} on every process; published: 1 where adapter/ now
    holds the adapter of this validation, 0 where an earlier one was better.

    Raises:
        ConfigError, DataError: the configuration does not fit the data, the model or the world.
        Stopped: a stop was requested and the state is saved.
        NotFinite, LossSpike, Untrained: a numerical guard ended the run before the step was applied.
        DiskFull: what was saved before stands.
    """
    require_steps(config.train)
    world = start_world()
    require_equal("the configuration", config.sha256())
    require_shared_folder(run_dir)
    paths = RunPaths(run_dir)
    micro_steps = micro_steps_of(config.train, world)
    splits = load_splits(config.data)
    say(f"loading the base model {config.model.path}", world.is_main)
    task = open_task(config, splits, world.device)
    examples = training_examples(task, splits.train, config.data)
    adapters = attach_adapter(config.adapter, task.base, config.train.max_steps, config.train.seed)
    require_same_inputs(splits.fingerprint, examples, adapters.model)
    origin = Origin(config.training_sha256(), splits.fingerprint)
    run = Run(config, origin, paths, world, task, adapters, examples, splits.validation, on_validation)
    if config.train.packing:
        check_packing(task.base.model, config.model.attention)
    stream = training_stream(task, splits, config.data, config.train)
    loader = open_loader(
        config.train, config.data.max_tokens, examples, adapters.specs[0], world.process_rank, world.world_size, stream
    )
    objective = TrainingObjective(task.objective(), adapters.axis, adapters.specs[0].consistency)
    run.engine = build_engine(config.train, adapters, objective, micro_steps, task.base.compute_dtype)
    if world.is_main:
        if not paths.config.exists():
            write_text(paths.config, dump_config(config))
        identity = task.base.identity.as_dict()
        write_json(paths.environment, describe_environment(identity, splits.fingerprint, world.world_size))
        update_status(paths, "train", "running", config_sha256=origin.config_sha256)
        describe(run, loader, micro_steps)
    run.resume()
    try:
        run.begin()
        make_up_validation(run)
        training_loop(run, loader, micro_steps)
    finally:
        run.metrics.close()
    restore_best(run)
    return run.finish()


def training_loop(run: Run, loader: BatchLoader, micro_steps: int) -> None:
    """Every optimizer step from where the run stands to train.max_steps."""
    train, world, engine, adapters = run.config.train, run.world, run.engine, run.adapters
    consistency, base = adapters.specs[0].consistency, run.task.base
    before = recent_losses(read_metrics(run.paths.metrics, train=["loss"]), run.counters.step, train.spike.window_steps)
    guards = Guards(engine, adapters, run.trained, train, run.paths, world, before)
    scale = LossScale(run.trained.values(), base.compute_dtype)
    work = work_of(base.model, run.trained.values(), train.activation_checkpointing)
    meter = Meter(work, world.device, base.identity.compute_dtype)
    progress = Progress(train.max_steps, run.counters.step, world.is_main)
    for step in range(run.counters.step, train.max_steps):
        started = time.monotonic()
        learning_rate = set_learning_rate(engine, train, step)
        batch = loader.of_step(step)
        supervised, length = sum_over_processes([batch.supervised, batch.tokens], world.device)  # global
        mean = GlobalMean(supervised, micro_steps * world.world_size)
        scale.choose(supervised, world.world_size)

        losses: list[float] = []
        divergences: list[float] = []
        rows_of = partial(micro_rows, run, batch, step)
        for micro in range(len(batch.micros)):
            last = micro == len(batch.micros) - 1
            engine.set_gradient_accumulation_boundary(last)
            rows = rows_of(micro)
            meter.add(rows.tensors, rows.counted)
            with adapters.axis.active(rows.plan):  # recomputation in the backward pass reads the plan too
                nll, divergence = engine(**rows.inputs)
                loss = nll + consistency.weight * divergence
                # Once a step: of each of its passes a part, and the engine divides every pass by micro_steps.
                penalty = run.budget.penalty() * (micro_steps / len(batch.micros))
                engine.backward((mean.for_engine(loss) + penalty) * scale.factor)
            losses.append(float(nll.detach()))
            if rows.pairs is not None:
                divergences.append(float(divergence.detach()))
            if last:  # what is not finite is never applied
                numbers = guards.check(step, losses, mean, rows_of, divergences, scale.describe())
                run.budget.observe(step + 1)  # the whole gradients, before the step clears them
            engine.step()  # updates at the boundary alone

        run.budget.apply(step + 1, numbers.gradient_norm)  # AdaLoRA prunes
        run.counters = replace(run.counters, step=step + 1)
        seconds = time.monotonic() - started
        run.metrics.write(
            "train",
            step=step + 1,
            **numbers.terms(),
            learning_rate=learning_rate,
            seconds=round(seconds, 4),
            gradient_norm=numbers.gradient_norm,
            tokens_per_second=round(length / seconds, 1),
            supervised_tokens=int(supervised),
            **meter.read(seconds),
            **run.budget.progress(),
        )
        if numbers.spike is not None:
            report_spike(run, numbers)
        if run.due(train.validate_every_steps):
            run.validate()
        if run.due(train.checkpoint_every_steps):
            run.save()
        progress.show(step + 1, progress_parts(numbers.terms(), length / seconds, run.scores))
        run.stop_if_requested()
    progress.close()


def report_spike(run: Run, numbers: StepNumbers) -> None:
    """One metrics row and one line: the step's loss was a spike."""
    step = run.counters.step
    run.metrics.write("spike", step=step, loss=numbers.loss, times_median=numbers.spike)
    text = f"step {step}: the loss {numbers.loss:.4g} is {numbers.spike:.1f} × its running median"
    say(text, run.world.is_main)


def set_learning_rate(engine: Any, train: TrainConfig, step: int) -> float:
    """Set every group's rate for a 0-based step (lora_B's times the LoRA+ ratio); returns that of lora_A."""
    factor = schedule_factor(step, train.max_steps, warmup_steps(train), train.schedule)
    for group in engine.optimizer.param_groups:
        group["lr"] = train.learning_rate * factor * group["ratio"]
    return train.learning_rate * factor


def micro_rows(run: Run, batch: StepBatch, step: int, micro: int) -> MemberBatch:
    """The rows of one pass of this process: a function of the step, so that it can be made again."""
    pass_, pad_id = batch.micros[micro], run.task.base.tokenizer.pad_token_id
    key = MaskKey(run.config.train.seed, step)
    return lay_out(run.adapters, pass_.examples, pass_.layout, pad_id, key, run.task.padding)


def progress_parts(losses: dict[str, float], tokens_per_second: float, scores: dict[str, float]) -> list[str]:
    """What the progress line says."""
    parts = [*(f"{name} {value:.4f}" for name, value in losses.items()), f"{tokens_per_second:.0f} tokens/s"]
    if scores:
        parts.append("validation " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return parts


def describe(run: Run, loader: BatchLoader, micro_steps: int) -> None:
    """Say before the first step what is going to be trained, and on what."""
    train, identity = run.config.train, run.task.base.identity
    trained = sum(zero.numel(parameter) for parameter in run.trained.values())
    total = sum(lengths_of(run.examples))
    sites = ", ".join(f"{s.position} {s.rate:g}" for s in run.adapters.specs[0].sites if s.rate > 0) or "none"
    stage = run.engine.zero_optimization_stage()
    say(f"processes    {run.world.world_size} (DeepSpeed ZeRO-{stage}, {torch.get_num_threads()} threads each)")
    say(
        f"base         {identity.path}: {identity.parameters:,} parameters, {identity.quantized_modules}"
        f" {identity.quantization.upper()} modules, compute {identity.compute_dtype}"
    )
    if stage == 3:
        say(f"sharding     {zero.sharding_text(run.adapters.model, run.world.world_size)}")
    head = f" and {', '.join(run.adapters.heads)}" if run.adapters.heads else ""
    held = {torch.float32: "fp32"}.get(next(iter(run.trained.values())).dtype, "bf16 with fp32 masters")
    say(f"adapter      {len(run.adapters.layers)} layers{head}, {trained:,} trainable parameters ({held})")
    for line in run.budget.describe():
        say(line)
    say(f"dropout      {sites}; {train.draws} draws per step, layout {train.draw_layout}")
    term = run.adapters.specs[0].consistency
    if term.kind != "none":
        carried = {"one": "one branch", "both": "all branches"}[term.branches]
        say(f"consistency  {term.kind}, weight {term.weight:g}, {train.draws // 2} pairs, gradient through {carried}")
    sample = " (a sample of the stream)" if run.config.data.streaming else ""
    say(f"data         {len(run.examples)} rows{sample}, {total:,} tokens, {run.task.supervision(run.examples)}")
    say(f"batch        {loader.describe(micro_steps)}")


def train_stage(run_dir: Path, trusted: bool = False) -> None:
    """Train what config.yaml of the run folder says."""
    try:
        train_run(load_saved(RunPaths(run_dir).config, trusted), run_dir)
    except Stopped:
        leave_world()
        raise
    leave_world()  # not after a failure: the others would report the broken connection first
