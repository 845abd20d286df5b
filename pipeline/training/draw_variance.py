"""What `split` costs in variance against `replicate`, at a batch: gradients of the same rows under other masks.

g_e(m) is the gradient of example e under mask draw m, B the examples of a step, S its draws. For a given batch both
layouts have the same expected gradient, over the masks. Their variance (trace of the covariance) is

    split       1/B² Σ_s Var[Σ_{e in part s} g_e(m_s)]          replicate       1/(S B²) Var[Σ_e g_e(m)]

The ratio is at least 1. It is 1 where all examples answer to a draw alike, S where they do so independently (always
under masks that are drawn per example, such as `lora_input`), and more where they contradict each other. Beside it
stands the variance that other rows make, which no layout changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import MaskKey
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.terms import GlobalMean
from pipeline.training.batch import lay_out
from pipeline.training.loader import StepBatch

LAYOUTS = ("split", "replicate")

GradientOf = Callable[[str, int, int], Tensor]
"""(layout, 0-based step, repeat) -> the gradient of the step's rows under the masks of the repeat."""


class Moments:
    """Of vectors that are seen one at a time."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._directions: Tensor | float = 0.0
        self._squares = 0.0

    def add(self, vector: Tensor) -> None:
        """One more."""
        vector = vector.double()
        square = float(vector.square().sum())
        self.count += 1
        self._sum = self._sum + vector
        self._directions = self._directions + vector / max(math.sqrt(square), 1e-300)
        self._squares += square

    @property
    def mean(self) -> Tensor:
        """Their mean."""
        return torch.as_tensor(self._sum) / self.count

    @property
    def norm(self) -> float:
        """Root mean square of their 2-norms."""
        return math.sqrt(self._squares / self.count)

    @property
    def variance(self) -> float:
        """Trace of their covariance, unbiased."""
        return (self._squares - self.count * float(self.mean.square().sum())) / (self.count - 1)

    @property
    def cosine(self) -> float:
        """Mean cosine of two of them."""
        square = float(torch.as_tensor(self._directions).square().sum())
        return (square - self.count) / (self.count * (self.count - 1))


@dataclass(frozen=True)
class LayoutNoise:
    """One layout, averaged over steps."""

    norm: float
    """Root mean square norm of a step's gradient."""
    cosine: float
    """Between two gradients of the same rows under other masks."""
    variance: float
    """By masks: of the gradient for given rows, summed over parameters."""


@dataclass(frozen=True)
class DrawVariance:
    """Both layouts at the same rows."""

    split: LayoutNoise
    replicate: LayoutNoise
    rows: float
    """Variance by rows: of the mask-averaged gradient between steps. 0 where it cannot be told from 0."""

    @property
    def ratio(self) -> float:
        """Variance by masks, `split` ÷ `replicate`."""
        return self.split.variance / self.replicate.variance

    @property
    def step_ratio(self) -> float:
        """The same with the variance by rows in both: what a step of training sees."""
        return (self.rows + self.split.variance) / (self.rows + self.replicate.variance)


def measure(gradient_of: GradientOf, steps: int, repeats: int) -> DrawVariance:
    """Both layouts on the rows of `steps` steps (2 or more), under `repeats` sets of masks each (2 or more)."""
    found: dict[str, list[Moments]] = {layout: [] for layout in LAYOUTS}
    between = Moments()
    for step in range(steps):
        for layout in LAYOUTS:
            moments = Moments()
            for repeat in range(repeats):
                moments.add(gradient_of(layout, step, repeat))
            found[layout].append(moments)
        between.add(found["replicate"][-1].mean)
    noise = {layout: _average(of_steps) for layout, of_steps in found.items()}
    rows = between.variance - noise["replicate"].variance / repeats  # a mean of few masks still varies by masks
    return DrawVariance(noise["split"], noise["replicate"], max(rows, 0.0))


def _average(of_steps: list[Moments]) -> LayoutNoise:
    count = len(of_steps)
    return LayoutNoise(
        math.sqrt(sum(m.norm**2 for m in of_steps) / count),
        sum(m.cosine for m in of_steps) / count,
        sum(m.variance for m in of_steps) / count,
    )


def step_gradient(
    adapters: Adapters, objective: TrainingObjective, batch: StepBatch, pad_id: int, key: MaskKey,
    side: Literal["left", "right"] = "left", weight: float = 0.0, smoothing: float = 0.0,
) -> Tensor:
    """The gradient of a step's loss with respect to all that is trained, flat, fp32 on the CPU; none is left behind.

    Args:
        batch: the whole global batch, of one process.
        side: where padding goes.
        weight: of the consistency term, where the method has one.
        smoothing: ε of label smoothing.
    """
    mean = GlobalMean(batch.supervised)
    for micro in batch.micros:
        rows = lay_out(adapters, micro.examples, micro.layout, pad_id, key, side, {0: smoothing})
        with adapters.axis.active(rows.plan):
            nll, divergence = objective(**rows.inputs)
            mean.for_engine(nll + weight * divergence).sum().backward()
    trained = [parameter for parameter in adapters.model.parameters() if parameter.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    adapters.model.zero_grad(set_to_none=True)
    return torch.cat([part.flatten().to("cpu", torch.float32) for part in parts])
