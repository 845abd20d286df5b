"""What is wanted of the figures, by name: the table says beside each whether it is reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """A bound on a median."""

    bound: Literal["at most", "at least", "below"]
    value: float

    @property
    def sign(self) -> str:
        """In a table."""
        return {"at most": "≤", "at least": "≥", "below": "<"}[self.bound]

    def reached_by(self, median: float) -> bool:
        """Whether the bound holds."""
        if self.bound == "at least":
            return median >= self.value
        return median < self.value if self.bound == "below" else median <= self.value


TARGETS = {
    "line": Target("at most", 0.38),
    "search": Target("at most", 0.35),
    "evaluation": Target("at most", 0.35),
    "trainer step": Target("at most", 0.45),
    "compare": Target("at most", 0.30),
    "step against plain PEFT": Target("at most", 0.60),
    "step against PEFT with dropout": Target("at most", 0.47),
    "share of a step": Target("at least", 0.80),
    "share of a forward": Target("at least", 0.90),
    "replicate": Target("at most", 3.0),
    "8 packed runs": Target("at least", 2.6),
    "4 packed runs": Target("at least", 1.35),
    "packing and early exit": Target("at least", 3.0),
    "memory of a pack": Target("below", 2.0),
    "first step": Target("at most", 12.0),
    "8B tokens": Target("at least", 8600.0),
    "8B memory": Target("at most", 12.0),
    "8B against PEFT": Target("at least", 1.8),
    "8B packed runs": Target("at least", 5.0),
    "8B decode": Target("at most", 1.25),
}
"""On two cores with SmolLM2-135M in NF4, those of an 8B-shaped base on an H100; those that compare with another
checkout are against commit 09e95c6."""
