"""Weighted ensembles: members taken more than once, and weights that fit validation rows best. Pure numpy.

Both have seen the labels that they are fitted to: judge them by other rows (`pipeline.scores.selection: halves`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.scores.bootstrap import Floats, Ints

STEPS = 24
"""Members that greedy selection takes, at most, those that it takes again included."""
LEAST_WEIGHT = 0.01
"""Fitted weights below it are no pass worth: they become 0."""
_GAP = 1e-6
_MOST_UPDATES = 20_000


def greedy_counts(members: int, most: int, loss: Callable[[Floats], float], steps: int = STEPS) -> Ints:
    """How often each of M members is taken by greedy selection with replacement: (M,).

    Caruana et al. 2004 (doi 10.1145/1015330.1015432): the member whose addition lowers the loss of the ensemble most is
    added, whether it is in it or not, until none lowers it. Members that are taken again cost no further pass.

    Args:
        most: different members, at most: forward passes per row.
        loss: of the ensemble under weights (M,) that are together 1.
    """
    counts, best = np.zeros(members, dtype=np.int64), np.inf
    for _ in range(steps):
        full = np.count_nonzero(counts) >= most
        offered = [m for m in range(members) if counts[m] or not full]
        trials = [loss((counts + (np.arange(members) == m)) / (counts.sum() + 1)) for m in offered]
        lowest = int(np.argmin(trials))
        if counts.any() and trials[lowest] >= best:
            break
        counts[offered[lowest]] += 1
        best = trials[lowest]
    return counts


def fit_weights(right: Floats) -> Floats:
    """The weights of the mixture that minimise -mean_n log sum_m w_m p_mn: (M, N) log-probabilities -> (M,).

    The NLL is convex in w. Each update of EM multiplies w_m by g_m = mean_n p_mn / sum_k w_k p_kn, which lowers it; the
    least NLL is at most log max_m g_m lower: the updates, 20 000 at most, end where that is 1e-6 nats.

    Args:
        right: log p_m of the right answer of row n, finite for some member.
    """
    likelihoods = np.exp(right.astype(np.float64) - right.max(axis=0))
    weights = np.full(len(right), 1.0 / len(right))
    for _ in range(_MOST_UPDATES):
        gains = (likelihoods / (weights @ likelihoods)).mean(axis=1)
        if gains.max() <= 1.0 + _GAP:
            break
        weights *= gains
    return weights / weights.sum()


def without_small(weights: Floats) -> Floats:
    """Weights (M,) below `LEAST_WEIGHT` set to 0, the others made 1 together."""
    kept = np.where(weights < LEAST_WEIGHT, 0.0, weights)
    return kept / kept.sum()
