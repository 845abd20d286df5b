"""The line of `--dry-run` that says what processes will send each other, and the sizes behind it, from shapes alone."""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from torch import nn

from pipeline.adapters.attach import attach, is_linear, linear_shape
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import RunConfig
from pipeline.config.deepspeed import read_ds_config, zero_stage
from pipeline.plan.communication import Sizes, collectives, gathered_again, uncounted
from pipeline.plan.layers import WIDTH
from pipeline.plan.memory import NoPlan, base_description, planned_on
from pipeline.plan.memory_trace import empty_model


def communication_line(config: RunConfig, processes: int) -> str:
    """One paragraph for people; nothing where one process sends nothing, or where there is no memory plan either.

    Args:
        processes: of one node.
    """
    train, launch = config.train, config.launch
    if processes * launch.nodes == 1:
        return ""
    whole, text = processes * launch.nodes, f"communication of a step ({train.deepspeed}): "
    settings = read_ds_config(train.deepspeed)
    why = reason_against(config, settings)
    if why is not None:
        return _wrapped(f"{text}not counted ({why})")
    try:
        _, description = base_description(config.model)
    except NoPlan:
        return ""
    sizes = sizes_of(description, planned_on(config.model)[1], config)
    passes = 1 if train.micro_tokens is not None else max(1, train.global_batch // (train.micro_batch * whole))
    found = collectives(settings, sizes, whole, passes)
    backward, sharded = sum(sizes.frozen) + sum(sizes.adapter), zero_stage(settings) == 3
    about = "about " if sharded and gathered_again(settings["zero_optimization"], backward) else ""
    parts = ", ".join(f"{one.what} by {one.kind} {one.sent(whole):,}" for one in found[:-2])
    rest = sum(one.sent(whole) for one in found[-2:])
    counted = f"{passes} pass{'es' if passes > 1 else ''}" if train.micro_tokens is None else "a step of one pass"
    return _wrapped(
        f"{text}each of {whole} processes sends {about}{sum(one.sent(whole) for one in found):,} bytes"
        f" ({counted}; {parts}, norm and loss {rest:,})"
    )


def reason_against(config: RunConfig, settings: dict[str, Any]) -> str | None:
    """Why bytes of this run cannot be counted."""
    if config.launch.hostfile is not None:
        return "only the launcher counts the processes of launch.hostfile"
    if config.adapter.kind == "adalora":
        return "AdaLoRA's budget reads whole gradients, too, while ranks change"
    other = uncounted(settings)
    return None if other is None else f"{config.train.deepspeed} has {other}"


def sizes_of(description: Any, dtype: torch.dtype, config: RunConfig) -> Sizes:
    """Numbers in what the adapter and the base hold, as DeepSpeed sees them.

    Args:
        description: transformers' configuration of the base.
        dtype: compute dtype.
    """
    model = empty_model(description, dtype, config.model.attention)
    attach(model, [AdapterSpec.from_config(config.adapter, config.train.max_steps)], config.adapter.target_modules, 0)
    head = model.get_output_embeddings()  # type: ignore[operator]
    outside = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    halved = config.model.quantization == "nf4"
    packed = {
        id(module.weight): linear_shape(module)
        for module in model.modules() if halved and is_linear(module) and module is not head
    }
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    frozen, embeddings, sides = [], [], {False: [], True: []}  # type: ignore[var-annotated]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sides[config.train.lora_plus_ratio != 1 and name.endswith("lora_B")].append(parameter.numel())
        elif id(parameter) in packed:
            inputs, outputs = packed[id(parameter)]
            frozen.append(-(-inputs * outputs // 2) // dtype.itemsize)
        elif id(parameter) not in outside:
            (embeddings if id(parameter) in tables else frozen).append(parameter.numel())
    groups = tuple(tuple(group) for group in sides.values() if group)
    return Sizes(groups, tuple(frozen), tuple(embeddings), dtype.itemsize)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
