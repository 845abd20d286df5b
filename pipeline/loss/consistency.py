"""The training objective: supervised loss and consistency term of one pass (arXiv 2403.00812, HiddenKey).

For an example under the draws m_1, m_2 of a pair (and, `js`, under no draw), Σ over its supervised places t,

    ℓ = Σ_t [ nll_t + λ · D_t ]       D = divergence(P_1, P_2[, P_0])          (pipeline.loss.terms)

    branches: both    nll = ½ (nll_1 + nll_2); gradient through every branch, also the mask-free one
    branches: one     nll = nll_1; P_2 and P_0 are constants: a forward without gradient, under a plan of its own

Exchanging m_1 and m_2 shows that both forms have the same expected gradient of the supervised part, and that `one` has
half the expected gradient of D for `kl`. The paper propagates through one branch; its grid of λ is for that form.

P is the distribution over the vocabulary at a supervised token, over the classes, or over the features of the last
representation (regression). With S draws per step there are S/2 pairs: see `pipeline.adapters.layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.adapters.members import MemberAxis, MemberPlan
from pipeline.config.method import Consistency
from pipeline.loss.terms import Kind, branch_terms


@dataclass(frozen=True)
class Reference:
    """The rows of the branches without gradient, and the plan they follow."""

    tensors: dict[str, Tensor]
    """What `Objective.features` is called with: P·F·B rows."""
    plan: MemberPlan
    branches: int
    """F, per example."""


@dataclass(frozen=True)
class Pairs:
    """Which rows of a pass are branches of one example: rows are (pair, branch, row), B of them per branch."""

    branches: int
    """G, per example."""
    weights: Tensor
    """(P·G·B,) weight of the row's example in the consistency term."""
    rows: int
    """B."""
    reference: Reference | None


@dataclass(frozen=True)
class Features:
    """What a model says at the n supervised places of its rows, row by row."""

    values: Tensor
    """(n, D) what `Objective.score` turns into losses and distributions."""
    rows: Tensor
    """(n,) row index of each place."""
    targets: Tensor
    """(n,) what is right there."""


class Objective(Protocol):
    """A model with the loss of its kind; the modules of `pipeline.loss.objective` are such."""

    def __call__(self, *, row_weights: Tensor, **tensors: Tensor) -> Tensor:
        """Σ weight(row) · loss over supervised places."""

    def features(self, **tensors: Tensor) -> Features:
        """One forward pass, up to the supervised places."""

    def score(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """((n, D), (n,)) -> ((n,) loss in nats, (n, V) log-probabilities that branches are compared by)."""


class TrainingObjective(nn.Module):
    """What the engine wraps: a module whose forward is both parts of the loss."""

    def __init__(self, objective: nn.Module, axis: MemberAxis, consistency: Consistency) -> None:
        super().__init__()
        self.objective = objective
        self._axis = axis
        self._kind: Kind = "js" if consistency.kind == "js" else "kl"

    def forward(self, *, row_weights: Tensor, pairs: Pairs | None = None, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(Σ weight · loss, Σ weight · D), in nats; the second is 0 without pairs.

        The branches without gradient are read here, inside the one call that the engine sees, and under their own
        plan; the backward pass, and what it recomputes, is then under the caller's plan again.

        Args:
            row_weights: (M·B,) weight of each row in the supervised loss.
            tensors: what the model reads, M·B rows (`pipeline.training.batch.MemberBatch.model_tensors`).
        """
        objective: Objective = self.objective  # type: ignore[assignment]
        if pairs is None:
            loss = objective(**tensors, row_weights=row_weights)
            return loss, torch.zeros_like(loss)
        constants = self._constants(objective, pairs)
        features = objective.features(**tensors)
        places = _by_branch(features, pairs.branches, pairs.rows)
        first = places[0]
        return branch_terms(
            features.values[places], constants, features.targets[first],
            row_weights[features.rows[places]], pairs.weights[features.rows[first]], objective.score, self._kind,
        )  # fmt: skip

    def _constants(self, objective: Objective, pairs: Pairs) -> Tensor | None:
        """(F, n, D) features of the branches without gradient."""
        if pairs.reference is None:
            return None
        with torch.no_grad(), self._axis.active(pairs.reference.plan):
            features = objective.features(**pairs.reference.tensors)
        return features.values[_by_branch(features, pairs.reference.branches, pairs.rows)]


def _by_branch(features: Features, branches: int, rows: int) -> Tensor:
    """(branches, n) indices into the places of a pass, each branch's in the same order of pair, row and token."""
    branch = (features.rows // rows) % branches
    return branch.argsort(stable=True).view(branches, -1)
