"""Ensembles from cached predictions: averages, subsets, and how many members are worth their cost. Pure numpy.

M members, N rows, C choices (1 for values). Nothing here runs a model: every size is scored from the same cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.scores.bootstrap import Floats, Ints
from pipeline.scores.classification import nll, row_nll
from pipeline.scores.regression import gaussian_nll

Space = Literal["probability", "logit", "value"]

SUBSET_LIMIT = 32
"""Subsets of one size that are scored where there are more."""
_ROUNDING = 1e-9
"""Members that agree make ensembles that differ by rounding alone."""


def average(log_probs: Floats, space: Space = "probability") -> Floats:
    """The members' average prediction: (M, N, C) -> (N, C), normalised.

    `probability`: log (1/M) sum_m p_m, the mixture. `logit`: the mean of log p_m, normalised again (the
    geometric mean). A choice that no member has stays at -inf. `value`: the mean of (M, N, 1) predicted numbers.
    """
    logs = log_probs.astype(np.float64)
    if space == "probability":
        return np.logaddexp.reduce(logs, axis=0) - math.log(len(logs))
    mean = logs.mean(axis=0)
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


def choose_size(curve: EnsembleCurve) -> int:
    """The smallest size whose score (lower is better) is within one standard error of the best size's.

    The standard error is that of the *paired* difference to the best size over rows, sd(difference) / sqrt(N),
    which a bootstrap over rows converges to. Use a curve of the validation split.
    """
    best = curve.row_values[int(np.argmin(curve.mean))]
    differences = zip(curve.sizes, curve.row_values - best, strict=True)
    return min(size for size, d in differences if d.mean() <= d.std() / math.sqrt(len(d)) + _ROUNDING)


def ensemble_nll(log_probs: Floats, labels: NDArray[Any], space: Space = "probability") -> float:
    """NLL of the average of all members (M, N, C), in nats; in the space `value` it is `gaussian_nll`."""
    score = gaussian_nll if space == "value" else nll
    return float(score(average(log_probs, space), labels))


def choose_adapters(
    log_probs: Sequence[Floats], labels: NDArray[Any], k_max: int, space: Space = "probability"
) -> tuple[int, ...]:
    """Greedy forward selection without replacement (Caruana et al. 2004, doi 10.1145/1015330.1015432).

    Starts from the adapter with the lowest `ensemble_nll`, adds the one that lowers that of the ensemble most (or
    raises it least) up to `k_max`, and returns the prefix of that order with the lowest one.

    Args:
        log_probs: One (N, C) per adapter, of the validation split.
    """
    stack, order, losses = np.stack(log_probs), list[int](), list[float]()
    while len(order) < min(k_max, len(stack)):
        rest = [k for k in range(len(stack)) if k not in order]
        trials = [ensemble_nll(stack[[*order, k]], labels, space) for k in rest]
        best = int(np.argmin(trials))
        order.append(rest[best])
        losses.append(trials[best])
    return tuple(order[: int(np.argmin(losses)) + 1])
