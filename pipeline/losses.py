"""Supervised-token losses: logits are computed for supervised positions only, in chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_TOKENS = 2048


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the next token is supervised: (row index, hidden position, token id), each (n,)."""
    rows, positions = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    return rows, positions, labels[rows, positions + 1]


def token_log_probs(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """log p(token) of every supervised token, in nats: (log_probs (n,), row index (n,)).

    Args:
        hidden: (B, T, D) last hidden states.
        labels: (B, T) token ids, IGNORE_INDEX where unsupervised, unshifted.
        head: (n, D) -> (n, V) logits.
    """
    rows, positions, targets = supervised_positions(labels)
    selected = hidden[rows, positions]
    parts = []
    for chunk, target in zip(selected.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        if torch.is_grad_enabled() and len(targets) > CHUNK_TOKENS:
            parts.append(checkpoint(_chunk_log_probs, chunk, target, head, use_reentrant=False))
        else:
            parts.append(_chunk_log_probs(chunk, target, head))
    return (torch.cat(parts) if parts else selected.sum(-1)), rows


def weighted_nll(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], row_weights: Tensor
) -> tuple[Tensor, int]:
    """Σ over supervised tokens of weight(row) · nll, in nats, and the number of tokens with weight above 0.

    Args:
        row_weights: (B,) weight of each row: 1, 1/S under `replicate`, 0 for a filler.
    """
    log_probs, rows = token_log_probs(hidden, labels, head)
    weights = row_weights[rows]
    return -(log_probs.float() * weights).sum(), int((weights > 0).sum())


def weighted_class_nll(logits: Tensor, classes: Tensor, row_weights: Tensor) -> Tensor:
    """Σ over rows of weight(row) · -log softmax(logits)[class], in nats.

    Args:
        logits: (B, C).
        classes: (B,) index of the right class.
        row_weights: (B,) as in `weighted_nll`.
    """
    return (torch.nn.functional.cross_entropy(logits.float(), classes, reduction="none") * row_weights).sum()


def weighted_squared_error(values: Tensor, scores: Tensor, row_weights: Tensor) -> Tensor:
    """Σ over rows of weight(row) · (value - score)². All arguments (B,)."""
    return ((values.float() - scores).square() * row_weights).sum()


def _chunk_log_probs(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return -torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
