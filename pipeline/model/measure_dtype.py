"""Whether this CPU trains faster in bfloat16: `python measure_dtype.py ROWS LENGTH HIDDEN MLP` prints seconds as JSON.

A program of its own, which imports nothing of ours: the command that asks (`pipeline.plan.compute_dtype`) loads no
torch. What is timed is a training pass of one transformer layer with frozen weights and adapters of rank 8, forwards
and backwards: products alone would promise more than a step gains. CPUs without bfloat16 instructions emulate it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

SECONDS = 0.6
"""After which no further pair is begun, once there are `LEAST`."""
LEAST, MOST = 3, 15
"""Pairs."""
HOPELESS = 3.0
"""Times float32's seconds on a few tokens: bfloat16 is emulated, and timing whole passes would take long."""
HEAD, RANK = 64, 8


def main(rows: int, length: int, hidden: int, mlp: int) -> dict[str, float]:
    """{"float32": s, "bfloat16": s} of a pass, medians of alternating pairs; of the processor's time, not the clock's:
    other work on the machine then falls on both alike."""
    layers = {"float32": Layer(hidden, mlp, torch.float32), "bfloat16": Layer(hidden, mlp, torch.bfloat16)}

    def both(rows: int) -> dict[str, float]:
        return {name: timed(partial(layer.train_pass, rows, length)) for name, layer in layers.items()}

    both(1)
    probe = both(1)
    if probe["bfloat16"] > HOPELESS * probe["float32"]:
        return probe
    both(rows)
    end, pairs = time.monotonic() + SECONDS, [both(rows)]
    while len(pairs) < LEAST or (time.monotonic() < end and len(pairs) < MOST):
        pairs.append(both(rows))
    return {name: statistics.median(pair[name] for pair in pairs) for name in layers}


class Layer:
    """A decoder layer in one precision: norm, attention, norm, gated MLP; every linear with an fp32 adapter."""

    def __init__(self, hidden: int, mlp: int, dtype: torch.dtype) -> None:
        self.dtype, self.hidden = dtype, hidden
        self._generator = torch.Generator().manual_seed(0)
        shapes = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden),
                  "gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
        self._weights = {name: (self._normal(*shape) / shape[1] ** 0.5).to(dtype) for name, shape in shapes.items()}
        self._adapters = {name: [(self._normal(*shape) / shape[1]).requires_grad_() for shape in ((RANK, i), (o, RANK))]
                          for name, (o, i) in shapes.items()}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        A, B = self._adapters[name]
        return functional.linear(x, self._weights[name]) + x @ A.to(self.dtype).T @ B.to(self.dtype).T

    def _norm(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(self.dtype)

    def train_pass(self, rows: int, length: int) -> None:
        """Forward and backward pass over (rows, length, hidden)."""
        x = self._normal(rows, length, self.hidden).to(self.dtype).requires_grad_()
        n = self._norm(x)
        q, k, v = (self._linear(name, n).view(rows, length, -1, HEAD).transpose(1, 2) for name in "qkv")
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x2 = x + self._linear("o", mixed.reshape(rows, length, self.hidden))
        n = self._norm(x2)
        inner = functional.silu(self._linear("gate", n)) * self._linear("up", n)
        y = x2 + self._linear("down", inner)
        y.float().square().mean().backward()


def timed(run: Callable[[], None]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    print(json.dumps(main(*(int(word) for word in sys.argv[1:5]))))
