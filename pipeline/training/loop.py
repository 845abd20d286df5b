"""The training loop: optimizer steps of one run under DeepSpeed, or of many runs that share their passes.

What one run does in a step never depends on the others: its rows, masks, losses, gradients, update, numbers and files
are those that it has alone. What fails or stops, fails or stops alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from pipeline.adapters.layout import joined, of_adapter
from pipeline.adapters.members import MaskKey
from pipeline.distributed.world import sum_over_processes
from pipeline.errors import Stopped
from pipeline.loss.terms import GlobalMean
from pipeline.run_folder.metrics import read_metrics
from pipeline.terminal import Progress, say
from pipeline.training.batch import MemberBatch, lay_out
from pipeline.training.engine import Engine
from pipeline.training.guards import Guards, StepNumbers, recent_losses
from pipeline.training.loader import BatchLoader, StepBatch, pass_tokens
from pipeline.training.loss_scale import LossScale
from pipeline.training.packed.budget import PassBudget
from pipeline.training.run import Run, validations_of
from pipeline.training.schedule import schedule_of
from pipeline.training.throughput import Meter, work_of

Endings: TypeAlias = "dict[Lane, Exception]"
"""Runs that a step has ended, and why: `Stopped`, or what they failed with."""


def train_step(engine: Engine, lanes: Sequence[Lane], budget: PassBudget | None = None) -> Endings:
    """One optimizer step of every run, and what is due after it. The runs that it ends are not stepped again.

    Args:
        lanes: runs on one base; under DeepSpeed one.
        budget: how large a pass is that several runs share; None: as large as it comes.
    """
    started = time.monotonic()
    ended: Endings = {}
    lanes = attempt(ended, lanes, Lane.open_step)
    passes = shared_passes(lanes, None if budget is None else budget.places)
    begun = budget.clock() if budget is not None else 0.0
    for number, parts in enumerate(passes):
        last = number == len(passes) - 1
        rows = rows_of_pass(parts)
        engine.set_boundary(last)
        with parts[0][0].run.adapters.axis.active(rows.plan):  # recomputation in the backward pass reads the plan too
            losses, divergences = engine(**rows.inputs)  # (K,) each: one of every run
            terms = [lane.for_engine(losses[k], divergences[k]) for k, (lane, _) in enumerate(parts)]
            engine.backward(sum(terms[1:], terms[0]))
        for k, (lane, _) in enumerate(parts):
            lane.note(rows, k, float(losses[k].detach()), float(divergences[k].detach()))
        if last:  # what is not finite is never applied
            lanes = attempt(ended, lanes, Lane.judge)
        engine.step([lane.run.slot for lane in lanes])  # updates at the boundary alone
    if budget is not None and passes:
        budget.note([places_of(parts) for parts in passes], budget.clock() - begun)

    lanes = attempt(ended, lanes, lambda lane: lane.record(time.monotonic() - started))
    lanes = validate(ended, lanes)
    attempt(ended, lanes, Lane.end_step)
    return ended


def attempt(ended: Endings, lanes: Sequence[Lane], work: Callable[[Lane], object]) -> list[Lane]:
    """Do something for each run; those for which it did not fail. A run's failure is no other's."""
    for lane in lanes:
        try:
            work(lane)
        except Exception as error:
            ended[lane] = error
    return [lane for lane in lanes if lane not in ended]


def validate(ended: Endings, lanes: Sequence[Lane]) -> list[Lane]:
    """Validate the runs that are due, all in one prediction pass; those runs that go on."""
    due = [lane for lane in lanes if lane.run.due(lane.train.validate_every_steps)]
    if len(due) == 1:
        attempt(ended, due, lambda lane: lane.run.validate())
    elif due:
        try:
            found = dict(zip(due, validations_of([lane.run for lane in due]), strict=True))
        except Stopped:
            attempt(ended, due, lambda lane: lane.run.stop())
        except Exception:  # of one of them, as where its answers are not finite: each finds out for itself
            attempt(ended, due, lambda lane: lane.run.validate())
        else:
            attempt(ended, due, lambda lane: lane.run.take_validation(found[lane]))
    return [lane for lane in lanes if lane not in ended]


@dataclass
class OpenStep:
    """The step that a run is in."""

    batch: StepBatch
    supervised: float
    """Supervised places of the global batch."""
    tokens: float
    """Its tokens."""
    mean: GlobalMean
    learning_rate: float
    losses: list[float]
    divergences: list[float]
    numbers: StepNumbers | None = None


class Lane:
    """One run in the loop: its batches, its guards and meters, and the step that it is in."""

    def __init__(
        self, run: Run, engine: Engine, loader: BatchLoader, micro_steps: int, scale: LossScale, shown: bool
    ) -> None:
        """
        Args:
            run: resumed.
            micro_steps: by which the engine divides on its own: see `GlobalMean`.
            shown: whether there is a progress line.
        """
        self.run, self.loader, self.micro_steps, self.scale = run, loader, micro_steps, scale
        self.train = train = run.config.train
        self.schedule = schedule_of(train)
        self.term, base, step = run.spec.consistency, run.task.base, run.counters.step
        before = recent_losses(read_metrics(run.paths.metrics, train=["loss"]), step, train.spike.window_steps)
        self.guards = Guards(run.slot, engine.objective, run.adapters, train, run.paths, run.world, before)
        work = work_of(base.model, sum(run.slot.sizes.values()), train.activation_checkpointing)
        self.meter = Meter(work, run.world.device, base.identity.compute_dtype)
        self.progress = Progress(train.max_steps, step, shown)
        self.step: OpenStep

    def open_step(self) -> None:
        """Set the learning rate, and fetch what the step trains on."""
        run, train, step = self.run, self.train, self.run.counters.step
        rate = train.learning_rate * self.schedule(step)
        run.slot.set_learning_rate(rate)
        batch = self.loader.of_step(step)
        supervised, tokens = sum_over_processes([batch.supervised, batch.tokens], run.world.device)  # global
        self.scale.choose(supervised, run.world.world_size)
        mean = GlobalMean(supervised, self.micro_steps * run.world.world_size)
        self.meter.clear()
        self.step = OpenStep(batch, supervised, tokens, mean, rate, [], [])

    def for_engine(self, loss: Tensor, divergence: Tensor) -> Tensor:
        """What the run adds to the backward pass."""
        # Once a step: of each of its passes a part, and the engine divides every pass by micro_steps.
        penalty = self.run.budget.penalty() * (self.micro_steps / len(self.step.batch.micros))
        return (self.step.mean.for_engine(loss + self.term.weight * divergence) + penalty) * self.scale.factor

    def note(self, rows: MemberBatch, number: int, loss: float, divergence: float) -> None:
        """A pass has been made, in which the run was the `number`-th."""
        self.meter.add(*rows.of_run(number))
        self.step.losses.append(loss)
        if rows.pairs and self.term.kind != "none":
            self.step.divergences.append(divergence)

    def rows_of(self, micro: int) -> MemberBatch:
        """The rows of one of its passes without those of others, made again: they are a function of the step."""
        return rows_of_pass([(self, micro)])

    def judge(self) -> None:
        """Look at loss and gradients before the update. Raises what `Guards.check` raises."""
        run, step = self.run, self.step
        step.numbers = self.guards.check(
            run.counters.step, step.losses, step.mean, self.rows_of, step.divergences, self.scale.describe()
        )
        run.budget.observe(run.counters.step + 1)  # the whole gradients, before the step clears them

    def record(self, seconds: float) -> None:
        """The step is applied: count it, and write its row."""
        run, step, numbers = self.run, self.step, self.numbers
        run.budget.apply(run.counters.step + 1, numbers.gradient_norm)  # AdaLoRA prunes
        run.counters = replace(run.counters, step=run.counters.step + 1)
        run.metrics.write(
            "train",
            step=run.counters.step,
            **numbers.terms(),
            learning_rate=step.learning_rate,
            seconds=round(seconds, 4),
            gradient_norm=numbers.gradient_norm,
            tokens_per_second=round(step.tokens / seconds, 1),
            supervised_tokens=round(step.supervised),
            **self.meter.read(seconds),
            **run.budget.progress(),
        )
        self.tokens_per_second = step.tokens / seconds
        if numbers.spike is not None:
            report_spike(run, numbers)

    def end_step(self) -> None:
        """What is due after a step and its validation. Raises `Stopped` where the run was asked to stop."""
        run = self.run
        if run.due(self.train.checkpoint_every_steps):
            run.save()
        self.progress.show(run.counters.step, progress_parts(self.numbers.terms(), self.tokens_per_second, run.scores))
        run.stop_if_requested()

    @property
    def numbers(self) -> StepNumbers:
        """Of a step that has been judged."""
        assert self.step.numbers is not None
        return self.step.numbers


def shared_passes(lanes: Sequence[Lane], places: int | None) -> list[list[tuple[Lane, int]]]:
    """(run, number of its micro-batch) of each pass: micro-batch i of all runs together, up to so many places."""
    passes: list[list[tuple[Lane, int]]] = []
    for i in range(max((len(lane.step.batch.micros) for lane in lanes), default=0)):
        parts: list[tuple[Lane, int]] = []
        for lane in (lane for lane in lanes if i < len(lane.step.batch.micros)):
            if parts and places is not None and places_of([*parts, (lane, i)]) > places:
                passes.append(parts)
                parts = []
            parts.append((lane, i))
        passes.append(parts)
    return passes


def places_of(parts: Sequence[tuple[Lane, int]]) -> int:
    """Tokens that a pass computes, padding and fillers included where there are some."""
    micros = [lane.step.batch.micros[i] for lane, i in parts]
    if parts[0][0].run.adapters.end_to_end:
        return sum(pass_tokens(m.layout, [len(row.input_ids) for row in m.examples], end_to_end=True) for m in micros)
    rows = sum(len(micro.layout.members) for micro in micros) * max(micro.layout.rows for micro in micros)
    return rows * max(len(example.input_ids) for micro in micros for example in micro.examples)


def rows_of_pass(parts: Sequence[tuple[Lane, int]]) -> MemberBatch:
    """The rows of one pass of this process, run by run, each run's under its own masks."""
    micros = [lane.step.batch.micros[i] for lane, i in parts]
    runs = [lane.run for lane, _ in parts]
    layouts = [of_adapter(micro.layout, run.slot.adapter) for micro, run in zip(micros, runs, strict=True)]
    examples = [example for micro in micros for example in micro.examples]
    layout = joined(layouts, [len(micro.examples) for micro in micros]) if len(parts) > 1 else layouts[0]
    keys = {run.slot.adapter: MaskKey(run.config.train.seed, run.counters.step) for run in runs}
    smoothing = {run.slot.adapter: run.config.train.label_smoothing for run in runs}
    task = runs[0].task
    return lay_out(
        runs[0].adapters, examples, layout, task.base.tokenizer.pad_token_id, keys, task.padding, smoothing
    )


def report_spike(run: Run, numbers: StepNumbers) -> None:
    """One metrics row and one line: the step's loss was a spike."""
    step = run.counters.step
    run.metrics.write("spike", step=step, loss=numbers.loss, times_median=numbers.spike)
    text = f"step {step}: the loss {numbers.loss:.4g} is {numbers.spike:.1f} × its running median"
    say(text, run.world.is_main)


def progress_parts(losses: dict[str, float], tokens_per_second: float, scores: dict[str, float]) -> list[str]:
    """What the progress line says."""
    parts = [*(f"{name} {value:.4f}" for name, value in losses.items()), f"{tokens_per_second:.0f} tokens/s"]
    if scores:
        parts.append("validation " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return parts
