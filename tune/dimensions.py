"""The space of a search as mathematics: dimensions, points, corners."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOST_CORNERS = 2048
EDGE = 0.05
"""Share of a range, at either end, in which a chosen value is said to lie at its edge."""

Values = dict[str, Any]
"""Dotted key -> value: one point of the space."""


@dataclass(frozen=True)
class Options:
    """A finite list of values; `grid` means that every one is visited in turn."""

    values: tuple[Any, ...]
    grid: bool = False

    def at(self, u: float) -> Any:
        """The value at the fraction u in [0, 1) of the list."""
        return self.values[int(u * len(self.values))]

    def extremes(self) -> tuple[Any, ...]:
        """Values to validate before anything starts: all of them."""
        return self.values

    def count(self) -> int:
        """Number of distinct values."""
        return len(self.values)

    def at_edge(self, value: Any) -> bool:
        """Whether a number is the smallest or largest of several."""
        numbers = [one for one in self.values if isinstance(one, int | float) and not isinstance(one, bool)]
        return len(numbers) > 1 and len(numbers) == len(self.values) and value in (min(numbers), max(numbers))

    def describe(self) -> dict[str, list[Any]]:
        """As a space file states it."""
        return {"grid" if self.grid else "choice": list(self.values)}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, evenly spread or evenly in the logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, u: float) -> float | int:
        """The number at the fraction u in [0, 1) of the range, floats to three significant digits."""
        if self.whole and not self.log:
            return int(self.low + math.floor(u * (self.high - self.low + 1)))
        if self.log:
            return self.tidy(math.exp(math.log(self.low) + u * math.log(self.high / self.low)))
        return self.tidy(self.low + u * (self.high - self.low))

    def tidy(self, number: float) -> float | int:
        """Rounded to what a table shows, and never outside the range."""
        rounded = round(number) if self.whole else float(f"{number:.3g}")
        clamped = min(max(rounded, self.low), self.high)
        return int(clamped) if self.whole else clamped

    def extremes(self) -> tuple[float | int, ...]:
        """Values to validate before anything starts: both ends."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def at_edge(self, value: float) -> bool:
        """Whether a number is within the outer twentieths of the range."""
        low, high, place = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return high > low and not low + EDGE * (high - low) < place < high - EDGE * (high - low)

    def count(self) -> int | None:
        """Number of distinct values; None where there is no end of them."""
        return int(self.high - self.low) + 1 if self.whole else None

    def describe(self) -> dict[str, list[Any]]:
        """As a space file states it."""
        return {"loguniform" if self.log else "uniform": list(self.extremes())}


Dimension = Options | Range


@dataclass(frozen=True)
class Space:
    """The dimensions of a search, in file order."""

    source: str
    dimensions: dict[str, Dimension]

    def count(self) -> int | None:
        """Number of distinct points; None where a dimension is continuous."""
        counts = [dimension.count() for dimension in self.dimensions.values()]
        return None if None in counts else math.prod(c for c in counts if c is not None)

    def grid_count(self) -> int:
        """Number of points of `grid`, which is not made for it."""
        return math.prod(d.count() for d in self.dimensions.values() if isinstance(d, Options) and d.grid)

    def grid(self) -> list[Values]:
        """Every combination of the `grid` dimensions; one empty combination where there is none."""
        keys = [k for k, d in self.dimensions.items() if isinstance(d, Options) and d.grid]
        return [dict(zip(keys, row, strict=True)) for row in itertools.product(*(self._values(k) for k in keys))]

    def points(self) -> Iterator[Values]:
        """Every point of a finite space."""
        keys = list(self.dimensions)
        for row in itertools.product(*(self._values(key) for key in keys)):
            yield dict(zip(keys, row, strict=True))

    def corners(self) -> Iterator[Values]:
        """Points to validate: each extreme at least once, then combinations of extremes."""
        extremes = {key: dimension.extremes() for key, dimension in self.dimensions.items()}
        for turn in range(max(len(values) for values in extremes.values())):
            yield {key: values[min(turn, len(values) - 1)] for key, values in extremes.items()}
        for row in itertools.islice(itertools.product(*extremes.values()), MOST_CORNERS):
            yield dict(zip(extremes, row, strict=True))

    def describe(self) -> dict[str, Any]:
        """JSON form: enters the ledger, so that another space is not mistaken for this one."""
        return {key: dimension.describe() for key, dimension in self.dimensions.items()}

    def _values(self, key: str) -> tuple[Any, ...]:
        dimension = self.dimensions[key]
        if isinstance(dimension, Options):
            return dimension.values
        return tuple(range(int(dimension.low), int(dimension.high) + 1))


def point_key(values: Mapping[str, Any]) -> str:
    """Equal points, equal text."""
    return json.dumps(values, sort_keys=True)
