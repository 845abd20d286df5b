"""Scores of training runs that differ in the seed alone: the mean over seeds and rows, its interval, and the spread.

Model: run s scores d_sr = mu + a_s + b_r + e_sr on row r; seeds and rows are both a sample. The mean over S seeds and
N rows has the variance sa²/S + sb²/N + se²/(S N). The last two together are what a bootstrap over rows of the mean over
seeds sees. The variance between the seeds' own scores is sa² + se²/N, of which se²/N is what the bootstrap sees of the
differences between seeds; what is left over S is the first. With A for it and B for the rows' part, the interval is

    mean ± sqrt(t²(S-1) A + t²(N-1) B)

which covers at least 95 % where A and B are independent (Banerjee 1960, Sankhya 22, 357: the half-widths of
two t intervals add up as squares) and does so with few seeds, where one t of pooled degrees of freedom falls short.
Nothing here needs the score to be a mean: only points and resamples enter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from pipeline.scores.bootstrap import LEVEL, Floats, Interval, percentile_interval

CLAIM_SEEDS = 3
"""Seeds from which on an interval over seeds may carry a claim: two leave one degree of freedom (t = 12.7)."""


@dataclass(frozen=True)
class Runs:
    """One score of K runs on the same rows: of one system at K seeds, or (K = 1) of one that has no seeds."""

    points: Floats
    """(K,) on the rows as they are."""
    resamples: Floats
    """(K, B), run by run on the same B resamples of rows."""
    units: int
    """Independent units (questions, documents) among the rows."""
    seeds: tuple[int, ...] = ()
    """Training seed of each run; empty where there are none to speak of."""

    @property
    def mean(self) -> float:
        """Over runs."""
        return float(self.points.mean())

    @property
    def spread(self) -> float | None:
        """Standard deviation between single runs (what another seed would change); None for fewer than two."""
        return float(self.points.std(ddof=1)) if len(self.points) > 1 else None

    def interval(self) -> Interval:
        """95 % for the mean over rows and, where there are several, seeds."""
        if len(self.points) == 1:
            return percentile_interval(self.mean, self.resamples[0])
        half = math.sqrt(_squared_half_width(self.seed_variance(), self.row_variance(), len(self.points), self.units))
        rows = percentile_interval(self.mean, self.resamples.mean(axis=0))  # wider where scores are clipped at 0
        return Interval(self.mean, min(self.mean - half, rows.low), max(self.mean + half, rows.high))

    def row_variance(self) -> float:
        """B, of the mean over runs: the bootstrap's, which is short by the factor (N - 1) / N."""
        return float(self.resamples.mean(axis=0).var(ddof=1)) * self.units / max(1, self.units - 1)

    def seed_variance(self) -> float:
        """A: between runs beyond what rows explain, of the mean over runs."""
        centred = self.resamples - self.resamples.mean(axis=1, keepdims=True)
        by_rows = float(centred.var(axis=0, ddof=1).mean()) * self.units / max(1, self.units - 1)
        return max(0.0, float(self.points.var(ddof=1)) - by_rows) / len(self.points)


@dataclass(frozen=True)
class Difference:
    """The mean paired difference of two systems, and how many seeds stand behind it."""

    interval: Interval
    seeds: int
    """Seeds that both have (or the one that has seeds has); 1 where neither has several."""
    spread: float | None
    """Standard deviation of the difference between single runs."""

    @property
    def claims(self) -> bool:
        """Whether it may be called a difference: the interval excludes 0, and not over two seeds alone."""
        return self.interval.excludes_zero and (self.seeds == 1 or self.seeds >= CLAIM_SEEDS)


def difference(first: Runs, second: Runs) -> Difference:
    """first - second, paired by row, and by seed where two or more seeds have trained both.

    A system of one run is the same for every seed of the other. Runs whose seed the other lacks (its training failed)
    are left out; where fewer than two seeds are common, means over unlike seeds are compared, and the variances between
    them add up.
    """
    if len(first.points) > 1 and len(second.points) > 1:
        common = [seed for seed in first.seeds if seed in second.seeds]
        if len(common) < 2:
            return _unpaired(first, second)
        first, second = _of_seeds(first, common), _of_seeds(second, common)
    runs = max(len(first.points), len(second.points))
    paired = Runs(first.points - second.points, first.resamples - second.resamples, first.units)
    return Difference(paired.interval(), runs, paired.spread)


def within_bounds(interval: Interval, lowest: float = -math.inf, highest: float = math.inf) -> Interval:
    """An interval of a score that cannot leave [lowest, highest]."""
    return Interval(interval.value, max(interval.low, lowest), min(interval.high, highest))


def _unpaired(first: Runs, second: Runs) -> Difference:
    value = first.mean - second.mean
    rows = Runs(np.array([value]), (first.resamples.mean(axis=0) - second.resamples.mean(axis=0))[None], first.units)
    fewest = min(len(first.points), len(second.points))
    between = first.seed_variance() + second.seed_variance()
    half = math.sqrt(_squared_half_width(between, rows.row_variance(), fewest, first.units))
    return Difference(Interval(value, value - half, value + half), fewest, None)


def _of_seeds(runs: Runs, seeds: Sequence[int]) -> Runs:
    places = [runs.seeds.index(seed) for seed in seeds]
    return Runs(runs.points[places], runs.resamples[places], runs.units, tuple(seeds))


def _squared_half_width(between: float, rows: float, seeds: int, units: int) -> float:
    t_seeds, t_rows = (float(stdtrit(max(1, count - 1), (1.0 + LEVEL) / 2.0)) for count in (seeds, units))
    return t_seeds**2 * between + t_rows**2 * rows
