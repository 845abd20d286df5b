"""The engine of many runs in one process on one device: plain autograd, and AdamW over their stacked parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters
from pipeline.config import TrainConfig
from pipeline.model.adamw import MOMENTS
from pipeline.training.engine import Slot
from pipeline.training.packed.adamw import Stack, StackedAdamW, Update, squared_norms, stacks_of


class StackedEngine:
    """See `pipeline.training.engine.Engine`."""

    def __init__(self, objective: nn.Module, adapters: Adapters) -> None:
        self._objective, self.adapters = objective, adapters
        self.optimizer = StackedAdamW()
        self.stacks: list[Stack] = []
        self._last = True
        self._norms: dict[int, float] | None = None

    @property
    def objective(self) -> nn.Module:
        """The model as a module whose forward is the losses."""
        return self._objective

    def open_slot(self, adapter: int, train: TrainConfig) -> StackedSlot:
        """The place of a run whose adapter has just been put onto the model; nothing is left of who had it before."""
        self.stacks = stacks_of(self.adapters)
        slot = StackedSlot(self, adapter, train)
        slot.restore(0, {}, {})
        return slot

    def close_slot(self) -> None:
        """A run's adapter has left."""
        self.stacks = stacks_of(self.adapters)

    def set_boundary(self, last: bool) -> None:
        """Whether the pass that comes is the last one of a step."""
        self._last = last

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Supervised losses and consistency terms, (K,) each."""
        return self._objective(**inputs)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a pass."""
        self._norms = None
        loss.backward()

    def squared_norm(self, adapter: int) -> float:
        """Of a run's gradients; those of all runs are computed at once."""
        if self._norms is None:
            self._norms = squared_norms(self.stacks)
        return self._norms.get(adapter, 0.0)

    def step(self, slots: Sequence[Slot]) -> None:
        """At the boundary update the runs in `slots`; all gradients are forgotten, those of failed runs, too."""
        if not self._last:
            return
        stepping = [slot for slot in slots if isinstance(slot, StackedSlot)]
        self.optimizer.step(self.stacks, {slot.adapter: slot.next_update() for slot in stepping})
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """As before the first pass of a step."""
        for stack in self.stacks:
            stack.parameter.grad = None
        self._norms = None


class StackedSlot:
    """One run among others; see `pipeline.training.engine.Slot`."""

    moments: tuple[str, ...] = MOMENTS

    def __init__(self, engine: StackedEngine, adapter: int, train: TrainConfig) -> None:
        self.adapter, self._engine, self._train = adapter, engine, train
        self._stacks = {stack.name: stack for stack in engine.stacks if adapter in stack.places}
        self.sizes: Mapping[str, int] = {name: self._own(name).numel() for name in self._stacks}
        self._steps, self._rate = 0, 0.0

    def value(self, name: str) -> Tensor:
        """See `Slot`."""
        return self._alone(name, self._stacks[name].parameter)

    def gradient(self, name: str) -> Tensor | None:
        """See `Slot`."""
        gradient = self._stacks[name].parameter.grad
        return None if gradient is None else self._stacks[name].rows(gradient)[self._place(name)]

    def moment(self, name: str, moment: str) -> Tensor | None:
        """See `Slot`."""
        if not self._steps:
            return None
        stack = self._stacks[name]
        rows = self._engine.optimizer.moments(stack, moment)
        return self._alone(name, rows[0] if stack.whole else rows)

    def restore(self, step: int, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `Slot`."""
        self._steps = step if moments else 0
        with torch.no_grad():
            for name, stack in self._stacks.items():
                if name in values:
                    self._own(name).copy_(values[name].view_as(self._own(name)))
                for moment in MOMENTS:
                    held = self._engine.optimizer.moments(stack, moment)[self._place(name)]
                    found = moments.get(name, {}).get(moment)
                    held.zero_() if found is None else held.copy_(found.view_as(held))

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """See `Slot`: all places of a parameter are here."""
        return parameter.detach()

    def squared_gradient_norm(self) -> float:
        """See `Slot`."""
        return self._engine.squared_norm(self.adapter)

    def set_learning_rate(self, rate: float) -> None:
        """See `Slot`."""
        self._rate = rate

    def next_update(self) -> Update:
        """Count a step, and say how it is made."""
        self._steps += 1
        train, norm = self._train, math.sqrt(self.squared_gradient_norm())
        clipping = min(1.0, train.max_gradient_norm / (norm + 1e-6))
        return Update(self._rate, train.lora_plus_ratio, train.weight_decay, self._steps, clipping)

    def _place(self, name: str) -> int:
        return self._stacks[name].places[self.adapter]

    def _own(self, name: str) -> Tensor:
        """The run's slice of a parameter, a view of it."""
        stack = self._stacks[name]
        return stack.rows(stack.parameter.detach())[self._place(name)]

    def _alone(self, name: str, values: Tensor) -> Tensor:
        """The run's part of a stacked tensor, in the shape that it has alone, on the CPU."""
        stack, place = self._stacks[name], self._place(name)
        own = values if stack.whole else values[place : place + 1]
        return own.detach().to("cpu", torch.float32).clone()
