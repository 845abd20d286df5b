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
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.data.encode import IGNORE_INDEX

Kind = Literal["kl", "js"]


Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""((n, D) features, (n,) targets) -> ((n,) loss in nats, (n, V) log-probabilities that branches are compared by)."""

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


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the next token is supervised: (row index, hidden position, token id), each (n,)."""
    rows, positions = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    return rows, positions, labels[rows, positions + 1]


def token_losses(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """-log p(token) of every supervised token, in nats: (losses (n,), row index (n,)).

    Args:
        hidden: (B, T, D) last hidden states.
        labels: (B, T) token ids, IGNORE_INDEX where unsupervised, unshifted.
        head: (n, D) -> (n, V) logits.
        smoothing: ε of label smoothing: (1 - ε) · -log p(token) + ε · the mean of -log p over the vocabulary.
    """
    rows, positions, targets = supervised_positions(labels)
    return chunked_losses(hidden[rows, positions], targets, head, smoothing), rows


def chunked_losses(
    selected: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], smoothing: float = 0.0
) -> Tensor:
    """(n, D) hidden states that predict (n,) tokens -> (n,) losses; more than a chunk of logits is made twice."""
    parts = []
    for chunk, target in zip(selected.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        if torch.is_grad_enabled() and len(targets) > CHUNK_TOKENS:
            parts.append(checkpoint(_chunk_losses, chunk, target, head, smoothing, use_reentrant=False))
        else:
            parts.append(_chunk_losses(chunk, target, head, smoothing))
    return torch.cat(parts) if parts else selected.sum(-1)


def weighted_nll(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], row_weights: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, int]:
    """Σ over supervised tokens of weight(row) · nll, in nats, and the number of tokens with weight above 0.

    Args:
        row_weights: (B,) weight of each row: 1, 1/S under `replicate`, 0 for a filler.
        smoothing: as in `token_losses`.
    """
    losses, rows = token_losses(hidden, labels, head, smoothing)
    weights = row_weights[rows]
    return (losses.float() * weights).sum(), int((weights > 0).sum())


def weighted_class_nll(logits: Tensor, classes: Tensor, row_weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Σ over rows of weight(row) · -log softmax(logits)[class], in nats.

    Args:
        logits: (B, C).
        classes: (B,) index of the right class.
        row_weights: (B,) as in `weighted_nll`.
        smoothing: as in `token_losses`, over the classes.
    """
    return (_cross_entropy(logits, classes, smoothing) * row_weights).sum()


def weighted_squared_error(values: Tensor, scores: Tensor, row_weights: Tensor) -> Tensor:
    """Σ over rows of weight(row) · (value - score)². All arguments (B,)."""
    return ((values.float() - scores).square() * row_weights).sum()


def nll_and_log_probs(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(n, V) logits, (n,) classes -> (n,) -log p(class) in nats (smoothed), (n, V) float32 log-probabilities."""
    log_probs = logits.float().log_softmax(-1)
    nll = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (torch.lerp(nll, -log_probs.mean(-1), smoothing) if smoothing else nll), log_probs


def branch_terms(
    moving: Tensor, fixed: Tensor | None, targets: Tensor, loss_weights: Tensor, weights: Tensor, score: Score,
    kind: Kind,
) -> tuple[Tensor, Tensor]:
    """Σ_g Σ_i u_gi · loss_gi and Σ_i w_i · D_i, in nats, over n supervised places read by several branches.

    Both terms share one pass of the head; log-probabilities never exist for more than CHUNK_TOKENS places × branches.

    Args:
        moving: (G, n, D) features of the branches that carry gradient.
        fixed: (F, n, D) features of the branches that do not, or None.
        targets: (n,) what is right at each place.
        loss_weights: (G, n) u, the weight of each branch's loss.
        weights: (n,) w, the weight of each place's divergence D over all G + F branches.
        kind: which divergence.
    """
    size = max(CHUNK_TOKENS // (len(moving) + (0 if fixed is None else len(fixed))), 1)
    parts = []
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        arguments = (
            moving[:, part], None if fixed is None else fixed[:, part], targets[part], loss_weights[:, part],
            weights[part], score, kind,
        )  # fmt: skip
        if torch.is_grad_enabled() and len(targets) > size:
            parts.append(checkpoint(_chunk_terms, *arguments, use_reentrant=False))
        else:
            parts.append(_chunk_terms(*arguments))
    total = torch.stack(parts).sum(0) if parts else moving.sum() * moving.new_zeros(2)
    return total[0], total[1]


def _chunk_terms(
    moving: Tensor, fixed: Tensor | None, targets: Tensor, loss_weights: Tensor, weights: Tensor, score: Score,
    kind: Kind,
) -> Tensor:
    losses, log_probs = _scored(moving, targets, score)
    if fixed is not None:
        with torch.no_grad():
            _, others = _scored(fixed, targets, score)
        log_probs = torch.cat([log_probs, others])
    return torch.stack([(losses * loss_weights).sum(), (divergence(kind, log_probs) * weights).sum()])


def _scored(features: Tensor, targets: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """(G, n, D) -> (G, n), (G, n, V)."""
    losses, log_probs = score(features.flatten(0, 1), targets.repeat(len(features)))
    return losses.view(len(features), -1), log_probs.view(*features.shape[:2], -1)


def _chunk_losses(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], smoothing: float) -> Tensor:
    return _cross_entropy(head(hidden), targets, smoothing)


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
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
