"""What members disagree about, in one row at a time. Pure numpy.

M members, N rows, C choices; log_probs (M, N, C) normalised over a row's choices, -inf for choices it does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.scores.bootstrap import Floats
from pipeline.scores.ensemble import average


def entropy(log_probs: Floats) -> Floats:
    """-sum_c p_c log p_c in nats: (..., C) -> (...); a choice of probability 0 adds nothing."""
    logs = log_probs.astype(np.float64)
    finite = np.where(np.isfinite(logs), logs, 0.0)
    return -(np.exp(logs) * finite).sum(axis=-1)


def mutual_information(log_probs: Floats, weights: Sequence[float] | None = None) -> Floats:
    """H(mean_m p_m) - mean_m H(p_m) in nats, means under `weights` (M,) or of all alike: (M, N, C) -> (N,).

    What is learnt of a row's answer by hearing which member is right (BALD, arXiv 1112.5745): 0 where all say the same,
    however unsure they are, and at most log min(M, C).
    """
    mixed, own = entropy(average(log_probs, "probability", weights)), entropy(log_probs)
    found = mixed - np.average(own, axis=0, weights=weights)
    return np.maximum(found, 0.0)  # below 0 by rounding alone: entropy is concave


def spread(values: Floats, weights: Sequence[float] | None = None) -> Floats:
    """Standard deviation over members, of probabilities or numbers: (M, ...) -> (...); 0 for a single member.

    Args:
        weights: (M,) of the members; None: all alike.
    """
    found = values.astype(np.float64)
    if weights is None:
        return found.std(axis=0)
    mean = np.average(found, axis=0, weights=weights)
    return np.sqrt(np.average((found - mean) ** 2, axis=0, weights=weights))
