"""The limit: the bare matrix products of the adapted linears, which no way of training on a frozen base can do without.

Forward x Wᵀ, backward dy W; no product for the base's own gradient, which nobody needs. Weights lie there dequantized,
in the compute dtype; inputs are there, too. Left out: the head, attention, everything element-wise. The backward of the
first layer's projections, whose inputs are embeddings, is in it, though nobody needs it.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.table import Limit
from benchmarks.timing import Spread, Times, Work, ratio
from pipeline.adapters.attach import linear_shape, match_targets
from pipeline.config import RunConfig
from pipeline.model.load import compute_dtype, load_skeleton


class Products:
    """One weight per linear, so that caches see what they see in a model."""

    def __init__(self, config: RunConfig, device: str) -> None:
        self._device = torch.device(device)
        chance, skeleton = self._chance(0), load_skeleton(config.model).model
        self._dtype = compute_dtype(config.model, self._device)
        names = match_targets(skeleton, config.adapter.target_modules)
        shapes = [linear_shape(skeleton.get_submodule(name)) for name in names]
        self._weights = [self._random(chance, outputs, inputs) for inputs, outputs in shapes]

    def work(self, vectors: int, backward: bool) -> Work:
        """All products of one pass over `vectors` tokens."""
        chance = self._chance(1)
        widths = {width for weight in self._weights for width in weight.shape}
        vectors_of = {width: self._random(chance, vectors, width) for width in sorted(widths)}

        @torch.no_grad()
        def products() -> None:
            for weight in self._weights:
                nn.functional.linear(vectors_of[weight.shape[1]], weight)
            if backward:
                for weight in reversed(self._weights):
                    torch.mm(vectors_of[weight.shape[0]], weight)

        return products

    def operations(self, vectors: int, backward: bool) -> int:
        """Multiplications and additions of `work`."""
        return (4 if backward else 2) * vectors * sum(weight.numel() for weight in self._weights)

    def _chance(self, seed: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(seed)

    def _random(self, chance: torch.Generator, *shape: int) -> torch.Tensor:
        """Drawn where it stays: a CPU takes a minute for the weights of 8 billion parameters."""
        return torch.randn(*shape, generator=chance, device=self._device, dtype=self._dtype) * 0.02


def limit_of(times: Times, products: str, work: str, operations: int, passes: float = 1.0) -> Limit:
    """What `passes` times the products take of a work, from rounds that both were in."""
    seconds = passes * Spread.of(times[products]).median
    return Limit(seconds, passes * operations / seconds / 1e9, ratio(times, products, work, passes))
