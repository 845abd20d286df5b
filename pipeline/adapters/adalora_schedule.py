"""AdaLoRA's rank budget over time (arXiv 2303.10512, eq. 12), in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.adapter import AdaLoRAConfig


@dataclass(frozen=True)
class RankSchedule:
    """b(t) triplets for an adapter of L layers, t = optimizer steps done (1 after the first).

    t <= warmup: L · initial_rank.  t >= total - final: L · target_rank.  In between, with
    u = (t - warmup) / (total - final - warmup), the whole part of L·target + L·(initial - target)·(1 - u)³.

    PEFT leaves the count of t to its caller; here the last step is t = total, so that `final` may be 0.
    """

    initial_rank: int
    target_rank: int
    warmup: int
    """Steps without pruning at the start (PEFT: tinit)."""
    final: int
    """Steps with settled ranks at the end (PEFT: tfinal)."""
    total: int
    """Steps in all (PEFT: total_step)."""
    interval: int = 1
    """Steps between prunings (PEFT: deltaT)."""
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    """Weight of the orthogonality term (PEFT: orth_reg_weight)."""

    @classmethod
    def from_config(cls, config: AdaLoRAConfig, target_rank: int, max_steps: int) -> RankSchedule:
        """The schedule of a run. Raises `ValueError` where its phases do not fit into `max_steps`."""
        warmup, final = config.steps(max_steps)
        return cls(
            config.initial_rank_for(target_rank), target_rank, warmup, final, max_steps,
            config.interval, config.beta1, config.beta2, config.orthogonality,
        )

    @property
    def settled(self) -> int:
        """The step at which the final ranks are chosen."""
        return self.total - self.final

    def budget(self, step: int, layers: int) -> int:
        """b(t): triplets kept over all layers."""
        initial, target = self.initial_rank * layers, self.target_rank * layers
        if step <= self.warmup:
            return initial
        if step >= self.settled:
            return target
        left = 1 - (step - self.warmup) / (self.settled - self.warmup)
        return int((initial - target) * left**3 + target)

    def prunes(self, step: int) -> bool:
        """Whether ranks are chosen anew after this step."""
        return step == self.settled or (self.warmup < step < self.settled and step % self.interval == 0)
