"""The terms of a pass: supervised losses, and how far apart the distributions of several branches are.

Logits are computed for supervised positions only, in chunks, also where several branches are compared.

The consistency terms are those of arXiv 2403.00812. G branches of one example give G distributions P_1 … P_G over the
same V outcomes. In nats; at least 0 (but for rounding), and 0 only where all branches agree:

    kl   D = ½ [KL(P_1 ‖ P_2) + KL(P_2 ‖ P_1)]           the bidirectional KL of R-Drop (arXiv 2106.14448, eq. 2)
    js   D = 1/G Σ_g KL(P_g ‖ M),  M = 1/G Σ_g P_g       the generalized Jensen-Shannon divergence, at most ln G

`js` has the mask-free distribution among its branches, as HiddenCut's consistency loss has (arXiv 2106.00149).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.data.encode import IGNORE_INDEX

Kind = Literal["kl", "js"]
Smoothing: TypeAlias = float | Tensor
"""ε of label smoothing: of all places, or (n,) where the runs of a pass have different ones."""

Score = Callable[[Tensor, Tensor, Smoothing], tuple[Tensor, Tensor]]
"""((n, D) features, (n,) targets, ε) -> ((n,) loss in nats, (n, V) log-probabilities that branches are compared by)."""

CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class GlobalMean:
    """Loss = Σ over supervised places ÷ supervised places of the *global* batch: here, and nowhere else, is it divided.

    So 4 examples at once, 4 × 1 accumulated, and two processes have the same loss and gradients.
    """

    supervised: float
    """Supervised places of the global batch, over all processes."""
    engine_divisor: int = 1
    """What the engine divides by on its own: accumulation steps × processes, over which it averages."""

    def of(self, total: float) -> float:
        """Σ of the whole global batch -> the loss that is logged."""
        return total / self.supervised

    def for_engine(self, total: Tensor) -> Tensor:
        """Σ of one pass -> what the engine is given: with its own division undone, gradients are those of the loss."""
        return total * (self.engine_divisor / self.supervised)


@dataclass(frozen=True)
class RowRuns:
    """Whose the rows of a pass are: K runs share it, each row belongs to one of them, and each run has its own loss."""

    run: Tensor
    """(M·B,) int64, 0 … K-1."""
    weights: Tensor
    """(M·B,) weight of each row in the supervised loss: 1, 1/S under `replicate`, 0 for a filler."""
    smoothing: tuple[float, ...] = (0.0,)
    """Of each run: ε of label smoothing."""

    @property
    def count(self) -> int:
        """K."""
        return len(self.smoothing)

    @property
    def row_smoothing(self) -> Smoothing:
        """One number where all runs have the same; else that of each row, (M·B,)."""
        if len(set(self.smoothing)) == 1:
            return self.smoothing[0]
        return torch.tensor(self.smoothing, device=self.run.device)[self.run]

    def totals(self, values: Tensor, rows: Tensor) -> Tensor:
        """(n,) values at places in `rows` (n,) -> (K,) sums by run. What is not finite stays with its own run."""
        if self.count == 1:
            return values.sum().unsqueeze(0)
        own = self.run[rows] == torch.arange(self.count, device=rows.device).unsqueeze(1)
        return torch.where(own, values, 0.0).sum(1)


def at_places(smoothing: Smoothing, rows: Tensor) -> Smoothing:
    """That of rows -> that of the places in `rows` (n,)."""
    return smoothing[rows] if isinstance(smoothing, Tensor) else smoothing


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the next token is supervised: (row index, hidden position, token id), each (n,)."""
    rows, positions = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    return rows, positions, labels[rows, positions + 1]


def token_losses(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], smoothing: Smoothing = 0.0,
    token_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-log p(token) of every supervised token, in nats: (losses (n,), row index (n,)).

    Args:
        hidden: (B, T, D) last hidden states.
        labels: (B, T) token ids, IGNORE_INDEX where unsupervised, unshifted.
        head: (n, D) -> (n, V) logits.
        smoothing: ε of label smoothing: (1 - ε) · -log p(token) + ε · the mean of -log p over the vocabulary; one
            number, or that of each row, (B,).
        token_rows: (1, N) row of each token, where rows are laid end to end.
    """
    rows, positions, targets = supervised_positions(labels)
    of = rows if token_rows is None else token_rows[rows, positions]
    return chunked_losses(hidden[rows, positions], targets, head, at_places(smoothing, of)), of


def chunked_losses(
    selected: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], smoothing: Smoothing = 0.0
) -> Tensor:
    """(n, D) hidden states that predict (n,) tokens -> (n,) losses; more than a chunk of logits is made twice."""
    parts = []
    for start in range(0, len(targets), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        arguments = selected[part], targets[part], head, at_part(smoothing, part)
        if torch.is_grad_enabled() and len(targets) > CHUNK_TOKENS:
            parts.append(checkpoint(_chunk_losses, *arguments, use_reentrant=False))
        else:
            parts.append(_chunk_losses(*arguments))
    return torch.cat(parts) if parts else selected.sum(-1)


def at_part(smoothing: Smoothing, part: slice) -> Smoothing:
    """Of some of the places."""
    return smoothing[part] if isinstance(smoothing, Tensor) else smoothing


def class_losses(logits: Tensor, classes: Tensor, smoothing: Smoothing = 0.0) -> Tensor:
    """(B, C) logits, (B,) index of the right class -> (B,) losses; `smoothing` as in `token_losses`, over classes."""
    return _cross_entropy(logits, classes, smoothing)


def nll_and_log_probs(logits: Tensor, targets: Tensor, smoothing: Smoothing = 0.0) -> tuple[Tensor, Tensor]:
    """(n, V) logits, (n,) classes -> (n,) -log p(class) in nats (smoothed), (n, V) float32 log-probabilities."""
    log_probs = logits.float().log_softmax(-1)
    nll = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if not isinstance(smoothing, Tensor) and not smoothing:
        return nll, log_probs
    return torch.lerp(nll, -log_probs.mean(-1), smoothing), log_probs


@dataclass(frozen=True)
class Places:
    """n supervised places that are read by G branches."""

    targets: Tensor
    """(n,) what is right at each."""
    rows: Tensor
    """(n,) row of the first branch: whose run they are."""
    loss_weights: Tensor
    """(G, n) u, the weight of each branch's loss."""
    weights: Tensor
    """(n,) w, the weight of each place's divergence D."""
    smoothing: Smoothing = 0.0

    def part(self, part: slice) -> Places:
        """Some of them."""
        return Places(
            self.targets[part], self.rows[part], self.loss_weights[:, part], self.weights[part],
            at_part(self.smoothing, part),
        )


def branch_terms(
    moving: Tensor, fixed: Tensor | None, places: Places, runs: RowRuns, score: Score, kind: Kind | None
) -> tuple[Tensor, Tensor]:
    """Σ_g Σ_i u_gi · loss_gi and Σ_i w_i · D_i of every run, (K,) each, in nats, over places read by several branches.

    Both terms share one pass of the head; log-probabilities never exist for more than CHUNK_TOKENS places × branches.

    Args:
        moving: (G, n, D) features of the branches that carry gradient.
        fixed: (F, n, D) features of the branches that do not, or None.
        kind: which divergence of all G + F branches; None = none, for a single branch.
    """
    count = len(places.targets)
    size = max(CHUNK_TOKENS // (len(moving) + (0 if fixed is None else len(fixed))), 1)
    parts = []
    for start in range(0, count, size):
        part = slice(start, start + size)
        arguments = (
            moving[:, part], None if fixed is None else fixed[:, part], places.part(part), runs, score, kind,
        )  # fmt: skip
        if torch.is_grad_enabled() and count > size:
            parts.append(checkpoint(_chunk_terms, *arguments, use_reentrant=False))
        else:
            parts.append(_chunk_terms(*arguments))
    total = torch.stack(parts).sum(0) if parts else moving.sum() * moving.new_zeros(2, runs.count)
    return total[0], total[1]


def _chunk_terms(
    moving: Tensor, fixed: Tensor | None, places: Places, runs: RowRuns, score: Score, kind: Kind | None
) -> Tensor:
    losses, log_probs = _scored(moving, places, score)
    nll = runs.totals((losses * places.loss_weights).sum(0), places.rows)
    if kind is None:
        return torch.stack([nll, torch.zeros_like(nll)])
    if fixed is not None:
        with torch.no_grad():
            _, others = _scored(fixed, places, score)
        log_probs = torch.cat([log_probs, others])
    return torch.stack([nll, runs.totals(divergence(kind, log_probs) * places.weights, places.rows)])


def _scored(features: Tensor, places: Places, score: Score) -> tuple[Tensor, Tensor]:
    """(G, n, D) -> (G, n), (G, n, V)."""
    branches, smoothing = len(features), places.smoothing
    every = smoothing.repeat(branches) if isinstance(smoothing, Tensor) else smoothing
    losses, log_probs = score(features.flatten(0, 1), places.targets.repeat(branches), every)
    return losses.view(branches, -1), log_probs.view(*features.shape[:2], -1)


def _chunk_losses(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], smoothing: Smoothing) -> Tensor:
    return _cross_entropy(head(hidden), targets, smoothing)


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: Smoothing) -> Tensor:
    if isinstance(smoothing, Tensor):
        return nll_and_log_probs(logits, targets, smoothing)[0]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


def divergence(kind: Kind, log_probs: Tensor) -> Tensor:
    """(G, …, V) log-probabilities of G branches -> (…) divergence in nats; `kl` takes two branches."""
    return jensen_shannon(log_probs) if kind == "js" else bidirectional_kl(*log_probs)


def bidirectional_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ [KL(P‖Q) + KL(Q‖P)] = ½ Σ_v (p_v - q_v)(log p_v - log q_v): (…, V)² -> (…).

    The product form is a sum of terms that are all ≥ 0, so nothing cancels where the two are close.
    """
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def jensen_shannon(log_probs: Tensor) -> Tensor:
    """1/G Σ_g KL(P_g ‖ M) with the mean M of all branches: (G, …, V) -> (…), between 0 and ln G."""
    log_mean = log_probs.logsumexp(0) - math.log(len(log_probs))
    return (log_probs.exp() * (log_probs - log_mean)).sum(-1).mean(0)


def representation_log_probs(hidden: Tensor) -> Tensor:
    """(…, D) last-layer representations -> (…, D) log-probabilities over their features.

    For regression the paper compares representations, since one predicted number is no distribution. It does not say
    how a vector becomes one; a softmax over the features, as over logits, is our choice. A shift of all features by
    one number is invisible to it.
    """
    return hidden.float().log_softmax(-1)
