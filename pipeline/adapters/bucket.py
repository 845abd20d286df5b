"""Adapters of one kind and one rank in one layer, stacked along K: each has a place, which another takes after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Bucket(nn.Module, ABC):
    """Parameters of shape (K, …) and who has which of the K places.

    It grows by allocation: a parameter is then another object, with room for one more adapter.
    """

    names: tuple[str, ...]
    """Its parameters, as PEFT calls them."""

    def __init__(self, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.rank, self.inputs, self.outputs = rank, inputs, outputs
        self.slot: dict[int, int] = {}
        """adapter -> its place."""
        self.scalings: list[float] = []
        """Of each place."""
        for name, shape in self.shapes().items():
            setattr(self, name, nn.Parameter(torch.zeros(0, *shape, dtype=torch.float32)))

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> its shape without K."""

    @abstractmethod
    def start(self, place: int, generator: torch.Generator) -> None:
        """Make a place the identity, as at a fresh start."""

    @abstractmethod
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (K, R, I) and B (K, O, R), the update of an adapter being s·B A."""

    @abstractmethod
    def forward(
        self, x_MNI: Tensor, adapters: Sequence[int], masks: dict[str, Tensor | None], means: Sequence[float]
    ) -> Tensor:
        """Updates of the members in `adapters`, (M, N, O)."""

    def take(self, adapter: int, scaling: float, generator: torch.Generator) -> None:
        """Give an adapter a place, and a fresh start there."""
        taken = set(self.slot.values())
        place = next((place for place in range(len(self.scalings)) if place not in taken), len(self.scalings))
        if place == len(self.scalings):
            self.scalings.append(scaling)
            for name in self.names:
                stacked = getattr(self, name)
                more = torch.zeros_like(stacked[:1]) if len(stacked) else stacked.new_zeros(1, *stacked.shape[1:])
                setattr(self, name, nn.Parameter(torch.cat([stacked.detach(), more.detach()])))
        self.slot[adapter], self.scalings[place] = place, scaling
        self.start(place, generator)

    def leave(self, adapter: int) -> None:
        """Its place is free for another."""
        self.slot.pop(adapter, None)
