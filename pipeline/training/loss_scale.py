"""float16 without underflow: a power of two on the loss, undone on every gradient as soon as it is float32.

The gradient of the mean over N supervised places is 1/N at each of them, and float16 has nothing below 6e-8: of a step
of two million places little is left. So the loss of a step is multiplied by a power of two that follows from N, and
each trained parameter, which is float32, divides what it receives. Both are exact. What accumulates, is reduced,
judged, observed, clipped and applied is therefore the gradient itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

PER_PLACE = 2.0**-5
"""What a supervised place weighs in the backward pass, at most. Between what underflows and what overflows: on a small
model with 400 places per pass, gradients lose from 2^-12 downwards and overflow from 2^10 upwards."""


class LossScale:
    """The factor of a step; 1 for every compute dtype but float16."""

    def __init__(self, parameters: Iterable[nn.Parameter], compute_dtype: torch.dtype) -> None:
        """Args: `parameters`, all that are trained: float32, and not yet part of a graph."""
        self.factor = 1.0
        self.needed = compute_dtype == torch.float16
        if self.needed:
            for parameter in parameters:
                parameter.register_hook(self._undo)

    def choose(self, supervised: float, processes: int) -> None:
        """For a step of `supervised` places over all processes, which average: each place weighs processes / N."""
        if self.needed:
            self.factor = max(1.0, PER_PLACE * 2.0 ** math.floor(math.log2(max(supervised, 1.0) / processes)))

    def describe(self) -> str:
        """For the message about a step whose gradients are not finite."""
        return f" (under a loss scale of {self.factor:g}, for float16)" if self.factor > 1.0 else ""

    def _undo(self, gradient: Tensor) -> Tensor:
        return gradient / self.factor
