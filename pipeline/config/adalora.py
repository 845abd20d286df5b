"""How an AdaLoRA adapter spends its rank (arXiv 2303.10512)."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.config.base import Section


def _check_span(span: int | float) -> int | float:
    if span < 0 or (isinstance(span, float) and span >= 1.0):
        raise ValueError("must be a whole number of steps, or a fraction of train.max_steps below 1")
    return span


Span = Annotated[int | float, AfterValidator(_check_span)]
"""Optimizer steps (a whole number), or a fraction of train.max_steps (rounded down)."""
Decay = Annotated[float, Field(gt=0.0, lt=1.0)]


class AdaLoRAConfig(Section):
    """The rank budget of `adapter.kind: adalora`. Its end, the average rank that is kept, is `adapter.rank`."""

    initial_rank: Annotated[int, Field(ge=1)] | None = None
    """R of every matrix at the start; None = 1.5 × adapter.rank, rounded up (the paper's section 3.3)."""
    warmup: Span = 0.1
    """Steps before the first pruning: a whole number, or a fraction of train.max_steps (the released GLUE scripts:
    a tenth to a sixth)."""
    final: Span = 0.4
    """Steps at the end with the final ranks: a whole number, or a fraction of train.max_steps (the released GLUE
    scripts: nearly half)."""
    interval: Annotated[int, Field(ge=1)] = 1
    """Steps between two prunings (the released scripts: 1 to 100, the more the longer the run)."""
    beta1: Decay = 0.85
    """Decay of the averaged sensitivity |w · gradient| (the paper's value)."""
    beta2: Decay = 0.85
    """Decay of its averaged uncertainty (the paper's value)."""
    orthogonality: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the regularizer that keeps P and Q orthogonal (the released scripts: 0.1, RTE 0.3; PEFT: 0.5)."""

    def initial_rank_for(self, target_rank: int) -> int:
        """R at the start."""
        return -(-3 * target_rank // 2) if self.initial_rank is None else self.initial_rank

    def steps(self, max_steps: int) -> tuple[int, int]:
        """(warm-up, final) in optimizer steps.

        Raises:
            ValueError: they leave no step in which ranks are pruned by what was observed before.
        """
        warmup, final = _steps(self.warmup, max_steps), _steps(self.final, max_steps)
        if max_steps - final <= max(warmup, 1):
            raise ValueError(
                f"adapter.adalora.warmup and adapter.adalora.final take {warmup} + {final} of train.max_steps ="
                f" {max_steps}, which leaves no step to prune in; lower them (fractions such as 0.1 and 0.4 fit every"
                " length of 2 steps or more) or raise train.max_steps"
            )
        return warmup, final


def _steps(span: int | float, max_steps: int) -> int:
    return span if isinstance(span, int) else int(span * max_steps + 1e-9)
