"""How large a pass that several runs share may be: found on the steps themselves, at no cost beside them.

A pass begins with the places (rows × tokens, padding included) of one micro-batch, and is doubled until two doublings
in a row bring nothing: one may seem to, where other programs want the machine. Of the sizes seen, the smallest that
makes 95 % of the most places per second is kept; where memory ends, the best that fits.
"""

from __future__ import annotations

import time

GAIN = 1.05
PATIENCE = 2
"""Doublings in a row that may bring less than that."""
CPU_PLACES = 2048
"""Without an accelerator passes do not grow beyond this, or twice a micro-batch that is larger: products are at their
limit long before, and memory has no end that could be noticed in time."""
SAMPLES = 2
"""Steps at each size, of which the fastest counts."""


class PassBudget:
    """The size of a pass, in places."""

    def __init__(self, accelerated: bool) -> None:
        """Args: `accelerated`: whether passes are made elsewhere than on the CPU, whose time is what counts else."""
        self.clock = time.monotonic if accelerated else time.process_time  # other programs slow down the former alone
        self._most = None if accelerated else CPU_PLACES
        self.places = 0
        """0 = nothing has been seen yet: every run has passes of its own."""
        self.settled = False
        self._rates: list[float] = []
        self._found: dict[int, float] = {}
        """Size -> places per second."""
        self._idle = 0

    def note(self, passes: list[int], seconds: float) -> None:
        """A step took `seconds` for passes of so many places each."""
        largest = max(passes)
        if not self.places and self._most is not None:
            self._most = max(self._most, 2 * largest)
        self.places = max(self.places, largest)
        if self.settled or largest <= self.places / 2 or len(passes) < 2:
            return  # it says nothing about passes of this size, or more room would change nothing
        self._rates.append(sum(passes) / seconds)
        if len(self._rates) < SAMPLES:
            return
        rate, self._rates = max(self._rates), []
        gains = rate >= GAIN * max(self._found.values(), default=0.0)
        self._idle = 0 if gains else self._idle + 1
        self._found[self.places] = rate
        if self._idle == PATIENCE or (self._most is not None and 2 * self.places > self._most):
            self._settle()
        else:
            self.places *= 2

    def shrink(self) -> bool:
        """A pass did not fit into memory; whether a smaller one is worth a try."""
        self._found = {size: rate for size, rate in self._found.items() if size < self.places}
        if self._found:
            self._settle()
        else:
            self.places, self.settled = self.places // 2, True
        return self.places > 0

    def _settle(self) -> None:
        enough = max(self._found.values()) / GAIN
        self.places, self.settled = min(size for size, rate in self._found.items() if rate >= enough), True
