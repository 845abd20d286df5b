"""The memory plan as `--dry-run` prints it: a table, the verdict, and what would fit; and what a step sends."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import Any

from pipeline.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.data.check import at_hand
from pipeline.data.encode import encode_training_rows
from pipeline.data.splits import load_splits
from pipeline.errors import DataError, UserError
from pipeline.model.kind import local_kind
from pipeline.model.load import load_tokenizer
from pipeline.plan.communication_line import communication_line
from pipeline.plan.layers import WIDTH
from pipeline.plan.memory import MIB, PAGES, SMALL, MemoryPlan, NoPlan, first_line, plan_memory
from pipeline.plan.memory_trace import Batch

SEEN_ROWS = 2000
"""Training rows that are tokenized to learn how long they are."""
CHECKPOINT_BYTES = 12
"""Per trained parameter: fp32 value and two moments."""


def memory_table(config: RunConfig, processes: int) -> str:
    """Lines for people about `processes` of one node: memory, and what a step sends where there are several."""
    lines = memory_lines(config, processes), communication_line(config, processes)
    return "\n".join(line for line in lines if line)


def memory_lines(config: RunConfig, processes: int) -> str:
    """The plan of one of them; one line with the reason where there can be none."""
    model, adapter, train = config.model, config.adapter, config.train
    try:
        batch, source = expected_batch(config.data, model, train.packing)
        plan = plan_memory(model, adapter, train, processes, batch)
        verdict = "fits" if plan.fits else f"DOES NOT FIT; {suggestion(model, adapter, train, processes, batch)}"
        bare = replace(plan, holes=0)
        if bare.fits and not plan.fits:
            verdict += f"; or, slower, with {PAGES}={SMALL} in the environment, which leaves no holes"
    except NoPlan as error:
        return f"memory: no plan ({error})"
    checkpointing = "on" if train.activation_checkpointing else "off"
    passes = f"micro-batch {train.micro_batch}" if train.micro_tokens is None else f"{train.micro_tokens} tokens a pass"
    device = "of this machine's memory per process" if plan.device == "cpu" else "of the smallest GPU"
    moments = ", ".join(f"{name} {mib(size)}" for name, size in plan.moments.items())
    disk, kept = CHECKPOINT_BYTES * plan.weights.trained, train.keep_checkpoints + 2
    return "\n".join([
        _wrapped(
            f"memory of one process ({source}: rows of {batch.tokens} tokens, {batch.supervised} supervised; {passes},"
            f" {train.draws} draws {train.draw_layout}, activation checkpointing {checkpointing},"
            f" attention {model.attention}):"
        ),
        *(f"  {name:44}{mib(size):>12}" for name, size in parts(model, train.deepspeed, plan, processes) if size),
        _wrapped(f"  at the most: {moments}"),
        _wrapped(
            f"  peak {mib(plan.peak)}{f', {mib(bare.peak)} without the holes,' if plan.holes else ''} of"
            f" {mib(plan.capacity)} {device}: {verdict}"
        ),
        _wrapped(
            f"  disk: {mib(disk)} per checkpoint, up to {mib(kept * disk)} (the newest {train.keep_checkpoints}, the"
            " best, one being written)"
        ),
    ])


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def parts(model: ModelConfig, deepspeed: str, plan: MemoryPlan, processes: int) -> list[tuple[str, int]]:
    """What the memory is taken by; parts of one another are indented."""
    double = ", double" if model.quantization == "nf4" and model.double_quantization else ""
    held = ", dequantized" if plan.weights.dequantized else ""
    dequantizing = 0 if held else plan.weights.largest
    return [
        (f"base, {model.quantization}{held}", plan.weights.quantized),
        (f"its quantization state{double}", plan.weights.scales),
        ("embeddings, head, norms, biases", plan.weights.others),
        (f"adapter, {plan.weights.trained:,} parameters", plan.adapter),
        ("gradients, reduced", plan.gradients),
        ("bucket they are reduced in", plan.bucket),
        (f"optimizer ({deepspeed}, {processes} processes)", plan.optimizer),
        ("forward pass: activations, logits", int(plan.passes.forward)),
        ("backward pass", int(plan.passes.backward)),
        ("one dequantized layer", dequantizing),
        ("holes in the C library's heap, at the most", plan.holes),
        ("libraries, tokenizer", plan.overhead),
    ]


def expected_batch(data: DataConfig, model: ModelConfig, packing: bool) -> tuple[Batch, str]:
    """The longest of the training rows where these lie on this machine, else what data.max_tokens allows; and which."""
    longest = data.max_tokens
    if not at_hand(data):
        return Batch(longest, longest), "data.max_tokens, all supervised"
    rows = load_splits(data).train[:SEEN_ROWS]
    try:
        encoded = encode_training_rows(rows, load_tokenizer(model), longest)
    except DataError as error:
        if local_kind(model) == "causal":
            raise  # training would end with it: so does the dry run
        raise NoPlan(first_line(error)) from error
    except UserError as error:
        raise NoPlan(first_line(error)) from error
    if packing:
        share = sum(row.supervised for row in encoded) / sum(len(row.input_ids) for row in encoded)
        return Batch(longest, round(share * longest)), f"packed, {len(encoded)} training rows read"
    batch = Batch(max(len(row.input_ids) for row in encoded), max(row.supervised for row in encoded))
    return batch, f"the longest of {len(encoded)} training rows"


def suggestion(
    model: ModelConfig, adapter: AdapterConfig, train: TrainConfig, processes: int, batch: Batch
) -> str:
    """The smallest change under which the plan fits: activation checkpointing, a smaller micro-batch, or both."""
    micro, smaller = train.micro_batch, []
    while micro % 2 == 0:
        micro //= 2
        smaller.append(micro)
    checkpointing = {"activation_checkpointing": True}
    tries: list[dict[str, Any]] = [checkpointing, *({"micro_batch": size} for size in smaller)]
    tries += [{**checkpointing, "micro_batch": size} for size in smaller]
    for change in tries:
        if plan_memory(model, adapter, train.model_copy(update=change), processes, batch).fits:
            return "it fits with " + " ".join(f"train.{key}={str(value).lower()}" for key, value in change.items())
    return "no micro-batch fits: lower data.max_tokens or adapter.rank, or take a smaller base or a larger device"


def mib(size: int) -> str:
    """Whole MiB."""
    return f"{size / MIB:,.0f} MiB"
