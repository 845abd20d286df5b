"""Rows cut into passes of the size that goes fastest: large ones leave the caches, small ones repeat fixed costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

SMALLEST = 512
"""Tokens of a pass: less is not tried."""
WORTH_TRYING = 8
"""Passes of the largest size that a prediction must have for others to be tried."""


@dataclass
class Pace:
    """Tries passes of the whole budget, a half and a quarter of it, and keeps to the fastest from then on.

    Under one member nothing is tried, all have the whole budget: the validations of a training repeat to the bit.
    """

    clock: Callable[[], float] = time.perf_counter
    seconds: dict[int, dict[int, float]] = field(default_factory=dict)
    """members -> tokens of a pass -> seconds per token."""

    def chunks(self, costs: Sequence[int], budget: int, members: int) -> Iterator[list[int]]:
        """Row indices, the longest first: rows · members · longest cost <= the size in force, or a single row.

        What happens until the next chunk is asked for is measured.

        Args:
            costs: tokens of each row.
            budget: tokens of a pass, at most.
            members: how often each row stands in it.
        """
        sizes = [size for size in (budget, budget // 2, budget // 4) if size >= SMALLEST] or [budget]
        found = self.seconds.setdefault(members, {})
        worth = members > 1 and sum(costs) * members >= WORTH_TRYING * budget
        order = sorted(range(len(costs)), key=lambda row: -costs[row])
        first = True  # of a prediction: it also does what is done once, and is not measured
        while order:
            untried = [size for size in sizes if size not in found] if worth and not first else []
            size = untried[0] if untried else min(found, key=found.__getitem__, default=sizes[0])
            count = max(1, size // (members * costs[order[0]]))
            chunk, order = order[:count], order[count:]
            began = self.clock()
            yield chunk
            if untried:
                found[size] = (self.clock() - began) / sum(costs[row] for row in chunk)
            first = False
