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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.adapters.members import MemberAxis, MemberPlan
from pipeline.loss.terms import Kind, Places, RowRuns, Smoothing, at_places, branch_terms


@dataclass(frozen=True)
class Reference:
    """The rows of the branches without gradient, and the plan they follow."""

    tensors: dict[str, Tensor]
    """What `Objective.features` is called with."""
    plan: MemberPlan


@dataclass(frozen=True)
class Pairs:
    """Which rows of a pass are branches of one example, for the runs whose consistency terms have one form."""

    kind: Kind
    branch: Tensor
    """(M·B,) which branch of its example each row is, 0 … G-1; -1 = a row of other runs. The rows of every branch have
    the same examples in the same order."""
    weights: Tensor
    """(M·B,) weight of the row's example in the term; 0 for fillers and for rows of other runs."""
    branches: int
    """G."""
    fixed: Tensor | None = None
    """The same as `branch` for the rows of the reference."""
    fixed_branches: int = 0
    """F."""


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

    def losses(self, *, smoothing: Smoothing = 0.0, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """((n,) loss of every supervised place, (n,) its row)."""

    def features(self, **tensors: Tensor) -> Features:
        """One forward pass, up to the supervised places."""

    def score(self, features: Tensor, targets: Tensor, smoothing: Smoothing = 0.0) -> tuple[Tensor, Tensor]:
        """((n, D), (n,)) -> ((n,) loss in nats, (n, V) log-probabilities that branches are compared by)."""


class TrainingObjective(nn.Module):
    """What the engine wraps: a module whose forward is both parts of the loss, of every run of a pass."""

    def __init__(self, objective: nn.Module, axis: MemberAxis) -> None:
        super().__init__()
        self.objective = objective
        self._axis = axis

    def forward(
        self, *, runs: RowRuns, pairs: Sequence[Pairs] = (), reference: Reference | None = None, **tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(Σ weight · loss, Σ weight · D) of every run, (K,) each, in nats; the second is 0 for a run without pairs.

        The branches without gradient are read here, inside the one call that the engine sees, and under their own
        plan; the backward pass, and what it recomputes, is then under the caller's plan again.

        Args:
            runs: whose each row is, and its weight in the supervised loss.
            tensors: what the model reads, M·B rows (`pipeline.training.batch.MemberBatch.model_tensors`).
        """
        objective: Objective = self.objective  # type: ignore[assignment]
        if not pairs:
            losses, rows = objective.losses(**tensors, smoothing=runs.row_smoothing)
            totals = runs.totals(losses * runs.weights[rows], rows)
            return totals, torch.zeros_like(totals)
        constants = self._constants(objective, reference)
        features = objective.features(**tensors)
        terms = []
        for one in pairs:
            index = _by_branch(features, one.branch, one.branches)
            fixed = None
            if constants is not None and one.fixed is not None:
                fixed = constants.values[_by_branch(constants, one.fixed, one.fixed_branches)]
            places = _places(features, index, runs, one.weights)
            terms.append(branch_terms(features.values[index], fixed, places, runs, objective.score, one.kind))
        paired = torch.stack([one.branch >= 0 for one in pairs]).any(0)
        if not bool(paired.all()):
            index = (~paired[features.rows]).nonzero().T
            places = _places(features, index, runs, runs.weights)
            terms.append(branch_terms(features.values[index], None, places, runs, objective.score, None))
        losses_of, divergences_of = zip(*terms, strict=True)
        return sum(losses_of), sum(divergences_of)  # type: ignore[return-value]

    def _constants(self, objective: Objective, reference: Reference | None) -> Features | None:
        """The features of the branches without gradient."""
        if reference is None:
            return None
        with torch.no_grad(), self._axis.active(reference.plan):
            return objective.features(**reference.tensors)


def _by_branch(features: Features, branch: Tensor, branches: int) -> Tensor:
    """(branches, n) indices into the places of a pass, each branch's in the same order of run, pair, row and token."""
    of_place = branch[features.rows]
    known = (of_place >= 0).nonzero().squeeze(1)
    return known[of_place[known].argsort(stable=True)].view(branches, -1)


def _places(features: Features, index: Tensor, runs: RowRuns, weights: Tensor) -> Places:
    """What `branch_terms` has to know of the places in `index` (G, n)."""
    first = features.rows[index[0]]
    smoothing = at_places(runs.row_smoothing, first)
    return Places(features.targets[index[0]], first, runs.weights[features.rows[index]], weights[first], smoothing)
