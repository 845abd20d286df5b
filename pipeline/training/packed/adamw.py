"""AdamW over the stacked parameters of many runs: what differs among them is a vector along K, not a loop.

Of run k with gradient g, clipping factor c, learning rate η (lora_B: times the LoRA+ ratio), decay λ, its t-th step:

    p ← p (1 - η λ)    m ← m + (1-β₁)(c g - m)    v ← β₂ v + (1-β₂)(c g)²
    p ← p - η / (1-β₁ᵗ) · m / (√v / √(1-β₂ᵗ) + ε)

which is torch.optim.AdamW with the gradients clipped as torch.nn.utils.clip_grad_norm_ does it, c = min(1, max_norm /
(norm + 1e-6)). Runs that do not step are not touched: neither their parameters nor their moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters
from pipeline.adapters.bucket import Bucket
from pipeline.model.adamw import MOMENTS

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Stack:
    """A parameter that holds several runs' values along its first dimension."""

    name: str
    """As it is called in a model with one run alone."""
    owner: nn.Module
    part: str
    """Its name in its owner: a bucket that grows has another parameter under it."""
    places: Mapping[int, int]
    """adapter -> index in it, at any time."""
    whole: bool = False
    """A copy of a trained head: all of it is one run's."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter of now."""
        return getattr(self.owner, self.part)  # type: ignore[no-any-return]

    def rows(self, values: Tensor) -> Tensor:
        """(K, …): that of a head is a stack of one."""
        return values.unsqueeze(0) if self.whole else values


@dataclass(frozen=True)
class Update:
    """What one run's step is made with."""

    rate: float
    ratio: float
    """Learning rate of lora_B over that of the others."""
    decay: float
    step: int
    """1 = the first."""
    clipping: float


def stacks_of(adapters: Adapters) -> list[Stack]:
    """Every trained parameter of the runs that are there, in the order of the model."""
    found = []
    for name, layer in adapters.layers.items():
        for bucket in layer.buckets:
            assert isinstance(bucket, Bucket)
            found += [Stack(f"{name}.buckets.0.{part}", bucket, part, bucket.slot) for part in bucket.names]
    for name, head in adapters.heads.items():
        for adapter, module in enumerate(head.copies):
            for leaf, _ in module.named_parameters():
                owner, _, part = leaf.rpartition(".")
                found.append(Stack(f"{name}.copies.0.{leaf}", module.get_submodule(owner), part, {adapter: 0}, True))
    return found


class StackedAdamW:
    """The moments of all runs, and their steps."""

    def __init__(self) -> None:
        self._moments: dict[tuple[nn.Module, str, str], Tensor] = {}

    def moments(self, stack: Stack, moment: str) -> Tensor:
        """(K, …) of a stack; zeros for places that have come since."""
        rows, key = stack.rows(stack.parameter.detach()), (stack.owner, stack.part, moment)
        held = self._moments.get(key)
        if held is None or len(held) < len(rows):
            grown = torch.zeros_like(rows)
            if held is not None:
                grown[: len(held)] = held
            self._moments[key] = held = grown
        return held

    @torch.no_grad()
    def step(self, stacks: Iterable[Stack], updates: Mapping[int, Update]) -> None:
        """Update the runs (by adapter) that `updates` names."""
        vectors: dict[tuple[object, ...], tuple[Tensor | None, list[Tensor]]] = {}
        for stack in stacks:
            chosen = tuple((adapter, place) for adapter, place in stack.places.items() if adapter in updates)
            parameter = stack.parameter
            if not chosen or parameter.grad is None:
                continue
            values, gradient = stack.rows(parameter.detach()), stack.rows(parameter.grad)
            lora_B = stack.part == "lora_B"
            key = (chosen, len(values), lora_B, values.dtype, values.device)
            if key not in vectors:
                vectors[key] = _vectors(chosen, len(values), [updates[a] for a, _ in chosen], lora_B, values)
            index, numbers = vectors[key]
            mean, square = (self.moments(stack, moment) for moment in MOMENTS)
            if index is None:
                _update(values, gradient, mean, square, numbers)
                continue
            parts = [tensor.index_select(0, index) for tensor in (values, gradient, mean, square)]
            _update(parts[0], parts[1], parts[2], parts[3], numbers)
            for tensor, part in ((values, parts[0]), (mean, parts[2]), (square, parts[3])):
                tensor.index_copy_(0, index, part)


def _vectors(
    chosen: tuple[tuple[int, int], ...], size: int, updates: list[Update], lora_B: bool, like: Tensor
) -> tuple[Tensor | None, list[Tensor]]:
    """Where the chosen runs are (None: all places, in order), and (K,) each: c, 1 - η λ, η / (1-β₁ᵗ), √(1-β₂ᵗ)."""
    ordered = sorted(zip((place for _, place in chosen), updates, strict=True), key=lambda pair: pair[0])
    rates = [one.rate * (one.ratio if lora_B else 1.0) for _, one in ordered]
    table = [
        [one.clipping for _, one in ordered],
        [1.0 - rate * one.decay for rate, (_, one) in zip(rates, ordered, strict=True)],
        [rate / (1.0 - BETA_1**one.step) for rate, (_, one) in zip(rates, ordered, strict=True)],
        [math.sqrt(1.0 - BETA_2**one.step) for _, one in ordered],
    ]
    numbers = torch.tensor(table, dtype=like.dtype, device=like.device)
    everyone = len(ordered) == size
    index = None if everyone else torch.tensor([place for place, _ in ordered], device=like.device)
    return index, list(numbers)


def _update(values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: list[Tensor]) -> None:
    clipping, kept, size, root = (vector.view(-1, *[1] * (values.dim() - 1)) for vector in numbers)
    gradient = gradient * clipping
    values.mul_(kept)
    mean.lerp_(gradient, 1.0 - BETA_1)
    square.mul_(BETA_2).addcmul_(gradient, gradient, value=1.0 - BETA_2)
    values.sub_(mean / square.sqrt().div_(root).add_(EPSILON) * size)


def squared_norms(stacks: Iterable[Stack]) -> dict[int, float]:
    """adapter -> the squared norm of all its gradients; one that is not finite is its own."""
    sums: dict[tuple[tuple[int, int], ...], Tensor] = {}
    for stack in stacks:
        gradient, places = stack.parameter.grad, tuple(stack.places.items())
        if gradient is not None and places:
            used = stack.rows(gradient)[: max(place for _, place in places) + 1]
            squares = torch.linalg.vector_norm(used.flatten(1), dim=1).double().square()
            sums[places] = sums[places] + squares if places in sums else squares
    found: dict[int, float] = {}
    for places, total in sums.items():
        of_place = total.tolist()
        for adapter, place in places:
            found[adapter] = found.get(adapter, 0.0) + of_place[place]
    return found
