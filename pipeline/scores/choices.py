"""Scores of a row's choices from the log-likelihoods of their texts. Pure numpy.

M members, N rows, C choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.scores.bootstrap import Floats, Ints

ChoiceScore = Literal["sum", "per_token", "per_character"]


@dataclass(frozen=True)
class ChoiceLikelihoods:
    """What every rule makes its scores of: one pass over the rows serves them all."""

    log_likelihoods: Floats
    """(M, N, C) float64: sum of log p over the scored tokens of each choice; -inf for choices that a row lacks."""
    tokens: Ints
    """(N, C) scored tokens, an end token included; 0 for choices that a row lacks."""
    characters: Ints
    """(N, C) characters of the text without the blanks around it; 0 likewise."""

    def log_probs(self, rule: ChoiceScore) -> Floats:
        """(M, N, C) float32: log softmax over a row's choices of log-likelihood / length; `sum` has length 1.

        The argmax is that of lm-evaluation-harness' acc (`sum`) and acc_norm (`per_character`).
        """
        lengths = {"sum": None, "per_token": self.tokens, "per_character": self.characters}[rule]
        scores = self.log_likelihoods if lengths is None else self.log_likelihoods / np.maximum(lengths, 1)
        peak = scores.max(axis=-1, keepdims=True)
        normalised = scores - peak - np.log(np.exp(scores - peak).sum(axis=-1, keepdims=True))
        return normalised.astype(np.float32)  # type: ignore[no-any-return]
