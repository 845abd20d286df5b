"""What trains: the engine that one loop works with, and a run's place in it. Here DeepSpeed, for one run.

The other engine, for many runs in one process, is `pipeline.training.packed.engine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters
from pipeline.config import TrainConfig
from pipeline.config.deepspeed import (
    decided_by,
    fill_ds_config,
    find_ds_config,
    optimizer_fault,
    read_ds_config,
    sharded_float16,
    zero_stage,
)
from pipeline.distributed import zero
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.model.adamw import MOMENTS, build_adamw, moment_names, restore_moments


class Slot(Protocol):
    """A run's parameters in an engine, by the names that they have where the run is alone. Reading is a collective."""

    adapter: int
    """The run's index on the member axis."""
    sizes: Mapping[str, int]
    """Name -> how many numbers, of everything that the run trains."""
    moments: tuple[str, ...]
    """What the optimizer keeps of each; some may lack the last ones."""

    def value(self, name: str) -> Tensor:
        """The whole fp32 value, on the CPU."""

    def gradient(self, name: str) -> Tensor | None:
        """The whole gradient between the last backward pass and the step."""

    def moment(self, name: str, moment: str) -> Tensor | None:
        """One of `moments`, whole, on the CPU; None before the first step, or where the optimizer has none."""

    def restore(self, step: int, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put values, and AdamW's moments and step count where there are some, back before the first step."""

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The whole value of a parameter of the adapters, as `adapter_matrices` asks for it."""

    def squared_gradient_norm(self) -> float:
        """This process's addend of the squared norm of the run's gradients."""

    def set_learning_rate(self, rate: float) -> None:
        """Of the next step, for lora_A; lora_B's is that times the LoRA+ ratio."""


class Engine(Protocol):
    """Makes gradients for the runs of a pass, and steps."""

    @property
    def objective(self) -> nn.Module:
        """The model as a module whose forward is the losses (`pipeline.loss.consistency.TrainingObjective`)."""

    def set_boundary(self, last: bool) -> None:
        """Whether the pass that comes is the last one of an optimizer step."""

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Supervised losses and consistency terms of the runs of a pass, (K,) each."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a pass."""

    def step(self, slots: Sequence[Slot]) -> None:
        """After a pass: at the boundary update the runs in `slots`, and forget all gradients."""


def trained_parameters(adapters: Adapters) -> dict[str, nn.Parameter]:
    """name -> parameter of everything that is trained; names do not depend on the engine's wrapping."""
    return {name: parameter for name, parameter in adapters.model.named_parameters() if parameter.requires_grad}


class DeepSpeedEngine:
    """One run, in one or many processes."""

    def __init__(self, engine: Any) -> None:
        self.inner = engine
        self._last = True

    @property
    def objective(self) -> nn.Module:
        """What DeepSpeed has wrapped."""
        return self.inner.module  # type: ignore[no-any-return]

    def set_boundary(self, last: bool) -> None:
        """The engine itself would count passes, whose number may differ from step to step."""
        self._last = last
        self.inner.set_gradient_accumulation_boundary(last)

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        return self.inner(**inputs)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """See `Engine`; DeepSpeed divides by accumulation steps and processes."""
        self.inner.backward(loss)

    def step(self, slots: Sequence[Slot]) -> None:
        """A step is not applied where the run has failed."""
        if slots or not self._last:
            self.inner.step()


class DeepSpeedSlot:
    """The one run of a DeepSpeed engine."""

    adapter = 0

    def __init__(self, engine: DeepSpeedEngine, trained: dict[str, nn.Parameter]) -> None:
        self._engine, self._trained = engine.inner, trained
        self.sizes: Mapping[str, int] = {name: zero.numel(parameter) for name, parameter in trained.items()}
        self.moments = moment_names(self._engine.optimizer)

    def value(self, name: str) -> Tensor:
        """See `Slot`."""
        return zero.full_fp32(self._trained[name])

    def gradient(self, name: str) -> Tensor | None:
        """See `Slot`."""
        return zero.full_gradient(self._trained[name])

    def moment(self, name: str, moment: str) -> Tensor | None:
        """See `Slot`."""
        return zero.full_moment(self._engine, self._trained[name], moment)

    def restore(self, step: int, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `Slot`."""
        for name, parameter in self._trained.items():
            zero.set_full_fp32(parameter, values[name])
        found = {self._trained[name]: dict(kept) for name, kept in moments.items()}
        if found and self.moments == MOMENTS:
            zero.restore_moments(self._engine, step, found)
        elif found:
            restore_moments(self._engine.optimizer, step, found)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """See `Slot`."""
        return zero.full_fp32(parameter)

    def squared_gradient_norm(self) -> float:
        """See `Slot`."""
        return zero.squared_gradient_norm(self._engine)

    def set_learning_rate(self, rate: float) -> None:
        """See `Slot`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]


def build_engine(
    train: TrainConfig, adapters: Adapters, objective: nn.Module, micro_steps: int, compute_dtype: torch.dtype
) -> DeepSpeedEngine:
    """DeepSpeed around the objective, configured from ds_configs/ with every "auto" filled.

    Args:
        objective: the model as a module whose forward is the losses.
        compute_dtype: the base's. Under ZeRO-3 the adapters have it, too, with fp32 masters; else they are fp32.

    Raises:
        ConfigError: the DeepSpeed JSON contradicts the run or leaves something open, ZeRO-3 meets float16, or the
            optimizer does not fit the stage or the device.
    """
    source = read_ds_config(train.deepspeed)
    on_cpu = next(iter(trained_parameters(adapters).values())).device.type == "cpu"
    if fault := optimizer_fault(source, train, on_cpu):
        raise fault
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
    groups = parameter_groups(adapters, train)
    optimizer = build_adamw(train.optimizer, groups, groups[0]["lr"], train.weight_decay)
    return DeepSpeedEngine(zero.build_engine(objective, optimizer, ds_config))


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
