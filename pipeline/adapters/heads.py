"""Modules that are trained whole beside the adapters - a classifier, a fresh pooler - one copy for each adapter.

Rows find their member's copy along the member axis, as they find its LoRA matrices. Copies and their arithmetic are
fp32 whatever the base computes in; they are never quantized and never LoRA-adapted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.members import MemberAxis, as_index
from pipeline.errors import ConfigError
from pipeline.randomness import key64


@dataclass(frozen=True)
class HeadState:
    """What one adapter's trained modules hold."""

    modules: tuple[str, ...] = ()
    """Their names in the model: PEFT's modules_to_save."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Parameter name in the model -> fp32 value on the CPU."""


class TrainedHead(nn.Module):
    """K trained copies of one module of the base, and its untrained start for members without an adapter.

    The start is frozen: the values of the checkpoint where it has the module, else the first adapter's draw. A base
    model's classes are then those of an untrained head.
    """

    def __init__(
        self, module: nn.Module, name: str, axis: MemberAxis, fresh: Collection[str], deviation: float, seed: int
    ) -> None:
        """
        Args:
            fresh: parameters that are new, so drawn: matrices ~ N(0, deviation²), biases 0, norm weights 1.
            seed: of the start that members without an adapter have.
        """
        super().__init__()
        self.start = module.to(torch.float32).requires_grad_(False)
        self.copies = nn.ModuleList()
        self.name = name
        self._axis, self._fresh, self._deviation = axis, tuple(fresh), deviation
        self._draw(self.start, seed, 0)

    def take(self, adapter: int, seed: int, origin: int) -> None:
        """Give an adapter its copy, at a fresh start: a function of (seed, origin, name) alone."""
        while len(self.copies) <= adapter:
            self.copies.append(copy.deepcopy(self.start).requires_grad_(True))
        with torch.no_grad():
            for own, first in zip(self.copies[adapter].parameters(), self.start.parameters(), strict=True):
                own.copy_(first)
        self._draw(self.copies[adapter], seed, origin)

    def _draw(self, module: nn.Module, seed: int, origin: int) -> None:
        for name, parameter in module.named_parameters():
            if name in self._fresh:
                key = key64(seed, "head", origin, f"{self.name}.{name}")
                generator = torch.Generator().manual_seed(key >> 1)
                with torch.no_grad():
                    parameter.copy_(_fresh_value(name, parameter.shape, self._deviation, generator))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(M·B, …) -> (M·B, …), each member's rows through its own copy: fp32, or as ZeRO-3 holds the copies.

        Raises:
            MemberAxisError: the input's leading size is not M·B.
        """
        plan = self._axis.plan_for(x.shape[0], self.name)
        x = x.to(next(self.start.parameters()).dtype)
        members: dict[int | None, list[int]] = {}
        for m, member in enumerate(plan.members):
            members.setdefault(member.adapter, []).append(m)
        if len(members) == 1:
            return self._module(next(iter(members)))(x, *args, **kwargs)
        x_MB = x.reshape(plan.size, -1, *x.shape[1:])
        outputs, order = [], []
        for adapter, chosen in members.items():
            rows = x_MB.index_select(0, as_index(chosen, x.device)).flatten(0, 1)
            outputs.append(self._module(adapter)(rows, *args, **kwargs))
            order.extend(chosen)
        stacked = torch.cat(outputs)
        place = torch.argsort(as_index(order, x.device))
        y_MB = stacked.reshape(plan.size, -1, *stacked.shape[1:]).index_select(0, place)
        return y_MB.flatten(0, 1)

    def _module(self, adapter: int | None) -> nn.Module:
        return self.start if adapter is None else self.copies[adapter]


def head_state(
    heads: Mapping[str, TrainedHead], adapter: int, value_of: Callable[[nn.Parameter], Tensor] = Tensor.detach
) -> HeadState:
    """The trained modules of one adapter. `value_of` gathers a parameter where it is sharded (then a collective)."""
    tensors = {
        f"{name}.{leaf}": value_of(parameter).to("cpu", torch.float32).clone()
        for name, head in heads.items()
        for leaf, parameter in head.copies[adapter].named_parameters()
    }
    return HeadState(tuple(heads), tensors)


def load_head(heads: Mapping[str, TrainedHead], adapter: int, stored: HeadState, field: str) -> None:
    """Copy a stored adapter's trained modules into its copies.

    Raises:
        ConfigError: the model trains other modules than the adapter holds, or a shape differs (other classes).
    """
    own = {
        f"{name}.{leaf}": parameter
        for name, head in heads.items()
        for leaf, parameter in head.copies[adapter].named_parameters()
    }
    if own.keys() != stored.tensors.keys():
        odd = ", ".join(sorted(own.keys() ^ stored.tensors.keys())[:3])
        raise ConfigError(
            field, None, f"holds other trained modules than the model has ({odd})",
            "Use its own base model: an adapter with a head belongs to a classifier, one without to a causal model.",
        )
    for name, parameter in own.items():
        theirs = stored.tensors[name].shape
        if parameter.shape != theirs:
            raise ConfigError(
                field, None, f"has {name} of shape {tuple(theirs)}, the model {tuple(parameter.shape)}",
                "The data must have as many choices as the adapter has classes.",
            )
        with torch.no_grad():
            parameter.copy_(stored.tensors[name])


def _fresh_value(name: str, shape: torch.Size, deviation: float, generator: torch.Generator) -> Tensor:
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * deviation
    return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
