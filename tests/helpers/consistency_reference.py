"""The consistency terms written out, and the draws of a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.method import Consistency

FORMS = [Consistency(kind=k, branches=b, weight=0.7) for k in ("kl", "js") for b in ("one", "both")]  # type: ignore[arg-type]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P‖Q) of probabilities (V,), term by term, in float64."""
    return sum((a * (a / b).log() for a, b in zip(p, q, strict=True)), torch.zeros((), dtype=torch.float64))


def draws_of(pair: int, term: Consistency) -> list[int | None]:
    return [2 * pair, 2 * pair + 1, *([None] if term.kind == "js" else [])]
