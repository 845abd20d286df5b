"""Times of works that take turns, and what is made of them: a machine whose speed drifts still compares fairly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Work = Callable[[], object]
Times = Mapping[str, Sequence[float]]
"""Name of a work -> its seconds, round by round."""


@dataclass(frozen=True)
class Spread:
    """What was measured several times: median, quartiles, extremes."""

    median: float
    low: float
    high: float
    lower_quartile: float
    upper_quartile: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles lie between the values, as numpy's default has them. At least one value."""
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), min(values), max(values), quartiles[0], quartiles[2], len(values))


def clock(kind: str, device: str) -> Callable[[], float]:
    """Seconds that have passed.

    Args:
        kind: `wall`, or `cpu`: this process's own on all its threads, which other processes hardly change.
        device: what must have finished before the clock is read.
    """
    read = time.process_time if kind == "cpu" else time.perf_counter
    if not device.startswith("cuda"):
        return read
    import torch

    def after_device() -> float:
        torch.cuda.synchronize()
        return read()

    return after_device


def alternate(works: Mapping[str, Work], rounds: int, now: Callable[[], float]) -> Times:
    """Call all works once unmeasured, then in turn (A B C A B C …), `rounds` times."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = now()
            work()
            times[name].append(now() - started)
    return times


def ratio(times: Times, first: str, second: str, scale: float = 1.0) -> Spread:
    """`scale` × time of the first / time of the second, round by round."""
    return Spread.of([scale * a / b for a, b in zip(times[first], times[second], strict=True)])


def faster(times: Times, names: Sequence[str]) -> str:
    """The name whose median is the least."""
    return min(names, key=lambda name: statistics.median(times[name]))
