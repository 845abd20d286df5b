"""The DeepSpeed engine around the objective, and what it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.adapters.attach import Adapters
from pipeline.config import TrainConfig
from pipeline.config.deepspeed import (
    decided_by,
    fill_ds_config,
    find_ds_config,
    read_ds_config,
    sharded_float16,
    zero_stage,
)
from pipeline.distributed import zero
from pipeline.distributed.world import World
from pipeline.errors import ConfigError


def trained_parameters(adapters: Adapters) -> dict[str, nn.Parameter]:
    """name -> parameter of everything that is trained; names do not depend on the engine's wrapping."""
    return {name: parameter for name, parameter in adapters.model.named_parameters() if parameter.requires_grad}


def build_engine(
    train: TrainConfig, adapters: Adapters, objective: nn.Module, micro_steps: int, compute_dtype: torch.dtype
) -> Any:
    """DeepSpeed around the objective, configured from ds_configs/ with every "auto" filled.

    Args:
        objective: the model as a module whose forward is the loss.
        compute_dtype: the base's. Under ZeRO-3 the adapters have it, too, with fp32 masters; else they are fp32.

    Raises:
        ConfigError: the DeepSpeed JSON contradicts the run or leaves something open, or ZeRO-3 meets float16.
    """
    source = read_ds_config(train.deepspeed)
    decided = decided_by(train, micro_steps, compute_dtype == torch.bfloat16)
    ds_config = fill_ds_config(source, decided, find_ds_config(train.deepspeed).name)
    if zero_stage(source) == 3:
        if compute_dtype == torch.float16:
            raise sharded_float16()
        zero.require_one_dtype(adapters.model, compute_dtype)
        zero.leave_head_outside(adapters.model)
    if train.activation_checkpointing:
        adapters.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    adapters.model.train()
    return zero.build_engine(objective, parameter_groups(adapters, train), ds_config, train.weight_decay)


def parameter_groups(adapters: Adapters, train: TrainConfig) -> list[dict[str, Any]]:
    """lora_B apart, so that LoRA+ can give it its own learning rate (arXiv 2402.12354)."""
    named = trained_parameters(adapters)
    sides: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        ratio = train.lora_plus_ratio if name.endswith("lora_B") else 1.0
        sides.setdefault(ratio, []).append(parameter)
    return [{"params": group, "lr": train.learning_rate, "ratio": ratio} for ratio, group in sides.items()]


def micro_steps_of(train: TrainConfig, world: World) -> int:
    """Gradient accumulation steps: global_batch / (micro_batch × processes).

    Raises:
        ConfigError: the division leaves a remainder.
    """
    per_pass = train.micro_batch * world.world_size
    if train.global_batch % per_pass:
        raise ConfigError(
            "train.global_batch",
            train.global_batch,
            f"must be a multiple of micro_batch × processes = {train.micro_batch} × {world.world_size} = {per_pass}",
            "Change train.micro_batch or launch.processes.",
        )
    return train.global_batch // per_pass
