"""Ensembles from cached predictions: averages, subsets, and how many members are worth their cost. Pure numpy.

M members, N rows, C choices (1 for values). Nothing here runs a model: every size is scored from the same cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.scores.bootstrap import Floats, Ints, Statistic, bootstrap
from pipeline.scores.classification import row_nll

Space = Literal["probability", "logit", "value"]

SUBSET_LIMIT = 32
"""Subsets of one size that are scored where there are more."""
CHOICE_SAMPLES = 500
"""Resamples behind the standard error of a choice."""
_ROUNDING = 1e-9
"""Members that agree make ensembles that differ by rounding alone."""


def average(log_probs: Floats, space: Space = "probability", weights: Sequence[float] | None = None) -> Floats:
    """The members' average prediction: (M, N, C) -> (N, C), normalised.

    `probability`: log sum_m w_m p_m, the mixture. `logit`: sum_m w_m log p_m, normalised again (the geometric mean). A
    choice that no member has stays at -inf. `value`: sum_m w_m of (M, N, 1) predicted numbers.

    Args:
        weights: w, at least 0 and together 1; None: 1/M each. Members of weight 0 are not looked at.
    """
    logs = log_probs.astype(np.float64)
    if weights is None:
        if space == "probability":
            return np.logaddexp.reduce(logs, axis=0) - math.log(len(logs))
        mean = logs.mean(axis=0)
    else:
        shares = np.asarray(weights, dtype=np.float64)
        logs, shares = logs[shares > 0.0], shares[shares > 0.0, None, None]
        if space == "probability":
            return np.logaddexp.reduce(logs + np.log(shares), axis=0)
        mean = (shares * logs).sum(axis=0)
    return mean if space == "value" else mean - np.logaddexp.reduce(mean, axis=-1, keepdims=True)


def subsets(members: int, size: int, limit: int = SUBSET_LIMIT, seed: int = 0) -> Ints:
    """Distinct subsets of `size` of the members 0..M-1: all of them, or `limit` drawn at random: (Q, size).

    Members are sorted within a subset; the first subset is the prefix 0..size-1, so prefixes of growing size nest.

    Raises:
        ValueError: size outside [1, M].
    """
    if not 1 <= size <= members:
        raise ValueError(f"subset size = {size}: must be in [1, {members}], the number of members")
    if math.comb(members, size) <= limit:
        return np.array(list(itertools.combinations(range(members), size)))
    random = np.random.default_rng([seed, members, size])
    found = {tuple(range(size)): None}
    while len(found) < limit:
        found[tuple(sorted(random.choice(members, size, replace=False).tolist()))] = None
    return np.array(list(found))


@dataclass(frozen=True)
class EnsembleCurve:
    """Score of ensembles by size.

    sizes (K,); mean (K,) over subsets; spread (K,) the standard deviation between subsets (0 where there is one);
    row_values (K, N) each row's score, averaged over subsets.
    """

    sizes: tuple[int, ...]
    mean: Floats
    spread: Floats
    row_values: Floats

    @classmethod
    def of(cls, sizes: Sequence[int], values: Sequence[Floats]) -> EnsembleCurve:
        """From one array (Q, N) per size: each of Q subsets' score on each row."""
        by_subset = [v.mean(axis=1) for v in values]
        return cls(
            sizes=tuple(sizes),
            mean=np.array([b.mean() for b in by_subset]),
            spread=np.array([b.std(ddof=1) if len(b) > 1 else 0.0 for b in by_subset]),
            row_values=np.stack([v.mean(axis=0) for v in values]),
        )


def ensemble_curve(
    log_probs: Floats,
    labels: Ints,
    sizes: Sequence[int],
    score: Callable[[Floats, Ints], Floats] = row_nll,
    space: Space = "probability",
    limit: int = SUBSET_LIMIT,
    seed: int = 0,
) -> EnsembleCurve:
    """Score ensembles of every size, averaged over subsets of the M cached members.

    Args:
        log_probs: (M, N, C).
        score: One value per row, (..., N, C) and labels (N,) -> (..., N), such as `classification.row_nll`.
    """
    return EnsembleCurve.of(sizes, [
        np.stack([score(average(log_probs[s], space), labels) for s in subsets(len(log_probs), size, limit, seed)])
        for size in sizes
    ])


def choose_cheapest(
    costs: Sequence[float], losses: Sequence[Statistic], rows: int, units: Ints | None = None
) -> int:
    """The cheapest candidate whose loss is within one standard error of the best one's: its index.

    The standard error is that of the *paired* difference to the best candidate, by bootstrap over the N rows (whole
    units). Of equally cheap candidates within it the one with the lowest loss wins. Use losses of validation rows.
    """
    points = np.array([loss.point() for loss in losses])
    best = int(points.argmin())
    table = bootstrap(losses, rows, CHOICE_SAMPLES, 0, units)
    errors = (table - table[:, [best]]).std(axis=0, ddof=1)
    within = [k for k in range(len(points)) if points[k] - points[best] <= errors[k] + _ROUNDING]
    return min(within, key=lambda k: (costs[k], points[k]))


def choose_adapters(
    log_probs: Sequence[Floats], k_max: int, loss: Callable[[Floats], float], space: Space = "probability"
) -> tuple[int, ...]:
    """Greedy forward selection without replacement (Caruana et al. 2004, doi 10.1145/1015330.1015432).

    Starts from the adapter with the lowest loss and adds the one that lowers that of the ensemble most (or raises it
    least) up to `k_max`: the whole order, of which `choose_cheapest` takes a beginning.

    Args:
        log_probs: One (N, C) per adapter, of the validation split.
        loss: Of an average (N, C).
    """
    stack, order = np.stack(log_probs), list[int]()
    while len(order) < min(k_max, len(stack)):
        rest = [k for k in range(len(stack)) if k not in order]
        trials = [loss(average(stack[[*order, k]], space)) for k in rest]
        order.append(rest[int(np.argmin(trials))])
    return tuple(order)
