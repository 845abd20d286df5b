"""The training stage: one adapter, in one of the processes that the DeepSpeed launcher starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.adapters.build import attach_adapter
from pipeline.config import RunConfig
from pipeline.data.cache import lengths_of
from pipeline.data.splits import load_splits
from pipeline.distributed import zero
from pipeline.distributed.world import leave_world, require_equal, require_shared_folder, start_world
from pipeline.errors import Stopped
from pipeline.loss.consistency import TrainingObjective
from pipeline.model.head import check_packing
from pipeline.prediction.task import open_task, training_examples, training_stream
from pipeline.run_folder.chain import Origin
from pipeline.run_folder.listeners import Callback
from pipeline.run_folder.paths import RunPaths, load_saved
from pipeline.terminal import say
from pipeline.training.batch import choose_rows
from pipeline.training.engine import (
    DeepSpeedEngine,
    DeepSpeedSlot,
    build_engine,
    micro_steps_of,
    trained_parameters,
)
from pipeline.training.environment import describe_environment
from pipeline.training.guards import require_same_inputs
from pipeline.training.loader import BatchLoader, open_loader
from pipeline.training.loop import Lane, train_step
from pipeline.training.loss_scale import LossScale
from pipeline.training.repair import make_up_validation, restore_best
from pipeline.training.run import OnValidation, Run
from pipeline.training.schedule import require_steps


def train_run(
    config: RunConfig, run_dir: Path, on_validation: OnValidation | None = None, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Train one adapter in this process (one of `world_size`), write the run folder, return the best validation.

    `on_validation` is told {"step", "nll", "accuracy", "published"} on every process; published: 1 where adapter/ now
    holds the adapter of this validation, 0 where an earlier one was better. `callbacks` are told on the main process.

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
    stream = training_stream(task, splits, config.data, config.train)
    longest = max(lengths_of(examples)) if stream is None else config.data.max_tokens
    padded_because = choose_rows(adapters, config.model.attention, longest)
    if config.train.packing and padded_because:
        check_packing(task.base.model, config.model.attention)
    loader = open_loader(
        config.train, config.data.max_tokens, examples, adapters.specs[0], world.process_rank, world.world_size, stream,
        adapters.end_to_end,
    )
    trained = trained_parameters(adapters)
    objective = TrainingObjective(task.objective(), adapters.axis)
    engine = build_engine(config.train, adapters, objective, micro_steps, task.base.compute_dtype)
    slot = DeepSpeedSlot(engine, trained)
    run = Run(
        config, origin, paths, world, task, adapters, examples, splits.validation, on_validation, slot, callbacks
    )
    if world.is_main:
        identity = task.base.identity.as_dict()
        run.record_start(describe_environment(identity, splits.fingerprint, world.world_size))
        describe(run, engine, loader, micro_steps, padded_because)
    run.resume()
    try:
        run.begin()
        make_up_validation(run)
        scale = LossScale(trained.values(), task.base.compute_dtype)
        lane = Lane(run, engine, loader, micro_steps, scale, shown=world.is_main)
        while not run.over:
            for error in train_step(engine, [lane]).values():
                raise error
        lane.progress.close()
    finally:
        run.metrics.close()
    restore_best(run)
    return run.finish()


def describe(
    run: Run, engine: DeepSpeedEngine, loader: BatchLoader, micro_steps: int, padded_because: str | None
) -> None:
    """Say before the first step what is going to be trained, and on what."""
    train, identity = run.config.train, run.task.base.identity
    trained = sum(run.slot.sizes.values())
    total = sum(lengths_of(run.examples))
    sites = ", ".join(f"{s.position} {s.rate:g}" for s in run.spec.sites if s.rate > 0) or "none"
    stage = engine.inner.zero_optimization_stage()
    say(f"processes    {run.world.world_size} (DeepSpeed ZeRO-{stage}, {torch.get_num_threads()} threads each)")
    say(
        f"base         {identity.path}: {identity.parameters:,} parameters, {identity.quantized_modules}"
        f" {identity.quantization.upper()} modules, compute {identity.compute_dtype}"
    )
    if stage == 3:
        say(f"sharding     {zero.sharding_text(run.adapters.model, run.world.world_size)}")
    head = f" and {', '.join(run.adapters.heads)}" if run.adapters.heads else ""
    dtype = next(iter(trained_parameters(run.adapters).values())).dtype
    held = "fp32" if dtype == torch.float32 else "bf16 with fp32 masters"
    say(f"adapter      {len(run.adapters.layers)} layers{head}, {trained:,} trainable parameters ({held})")
    for line in run.budget.describe():
        say(line)
    say(f"dropout      {sites}; {train.draws} draws per step, layout {train.draw_layout}")
    term = run.spec.consistency
    if term.kind != "none":
        carried = {"one": "one branch", "both": "all branches"}[term.branches]
        say(f"consistency  {term.kind}, weight {term.weight:g}, {train.draws // 2} pairs, gradient through {carried}")
    sample = " (a sample of the stream)" if run.config.data.streaming else ""
    say(f"data         {len(run.examples)} rows{sample}, {total:,} tokens, {run.task.supervision(run.examples)}")
    say(f"batch        {loader.describe(micro_steps)}")
    say(f"rows         {f'padded: {padded_because}' if padded_because else 'end to end, without padding'}")


def train_stage(run_dir: Path, trusted: bool = False) -> None:
    """Train what config.yaml of the run folder says."""
    try:
        train_run(load_saved(RunPaths(run_dir).config, trusted), run_dir)
    except Stopped:
        leave_world()
        raise
    leave_world()  # not after a failure: the others would report the broken connection first
