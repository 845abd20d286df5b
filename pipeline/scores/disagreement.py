"""What members disagree about, and people, in one row at a time. Pure numpy.

M members, N rows, C choices; log_probs (M, N, C) normalised over a row's choices, -inf for choices it does not have.

People: shares (N, C) of those asked about a row, each row summing to 1. A predictor agrees with them where it is as
unsure as they are: where they differ, being sure of the majority's choice is an error of these scores, not of accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.scores.bootstrap import Floats, RowMean, Statistic
from pipeline.scores.ensemble import average
from pipeline.scores.regression import Correlation


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


def row_cross_entropy(log_probs: Floats, shares: Floats) -> Floats:
    """-sum_c q_c log p_c, the NLL in the mean over the people asked (arXiv 1908.07086): (..., N).

    At least the entropy of q; infinite where a choice of some people has probability 0.
    """
    return -(shares * np.where(shares > 0.0, log_probs.astype(np.float64), 0.0)).sum(axis=-1)


def row_divergence(log_probs: Floats, shares: Floats) -> Floats:
    """Jensen-Shannon divergence H((p + q) / 2) - (H(p) + H(q)) / 2, in [0, log 2] (arXiv 2010.03532): (..., N)."""
    logs = log_probs.astype(np.float64)
    with np.errstate(divide="ignore"):
        people, mixed = np.log(shares), np.log((np.exp(logs) + shares) / 2.0)
    return np.maximum(entropy(mixed) - (entropy(logs) + entropy(people)) / 2.0, 0.0)


def rater_scores(log_probs: Floats, shares: Floats) -> dict[str, Statistic]:
    """Scores of Q predictors (Q, N, C): both of the above, and Pearson's correlation over rows between the entropy
    of the prediction and that of the people's choices."""
    with np.errstate(divide="ignore"):
        people = entropy(np.log(shares))
    return {
        "rater_cross_entropy": RowMean(row_cross_entropy(log_probs, shares)),
        "rater_divergence": RowMean(row_divergence(log_probs, shares)),
        "rater_entropy": Correlation(entropy(log_probs), people, "pearson"),
    }
