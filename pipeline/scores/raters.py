"""Agreement of predicted probabilities with how many people chose each choice.

log_probs (..., N, C), -inf for a choice that a row does not have; shares (N, C) of the people asked about a row, each
row summing to 1. In nats. A predictor agrees where it is as unsure as people are: where they differ, being sure of the
majority's choice is an error of these scores, not of accuracy.
"""

from __future__ import annotations

import numpy as np

from pipeline.scores.bootstrap import Floats, RowMean, Statistic
from pipeline.scores.disagreement import entropy
from pipeline.scores.regression import Correlation


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
