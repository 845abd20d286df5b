"""Attention with dropped keys or pairs, as pure functions of tensors.

Shapes: B rows, H query heads, G key-value heads (H a multiple of G), T tokens, D features per head.

DropKey drops logits:           w = softmax(s + dropped · (-∞))
DropAttention, normalized:      w'_j = m_j w_j / NoGrad(Σ_i m_i w_i),  w = softmax(s),  m = 1 - dropped
                                (arXiv 2403.00812; without NoGrad this is DropKey)

A query all of whose visible keys are dropped attends as if none were. Keys that the model's own mask hides (future,
padding, other examples of a packed row) have weight 0 exactly, whatever is dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN_BELOW = -4096.0
"""An additive mask this low hides a key: below any logit, above what the models' finite masks hold (-1e4 or less)."""
_DROPPED = -10240.0
"""About -1e4 and exact in bfloat16 and float16."""
_FLASH_MAX_WIDTH = 256


@dataclass(frozen=True)
class AttentionInputs:
    """What an attention module hands to its kernel."""

    query: Tensor
    """(B, H, T, D)."""
    key: Tensor
    """(B, G, T, D)."""
    value: Tensor
    """(B, G, T, D)."""
    mask: Tensor | None
    """None, bool (True = visible) or additive, broadcastable to (B, H, T, T)."""
    scale: float
    """s = scale · q·k."""
    causal: bool
    """Where there is no mask: whether a query sees only itself and earlier keys."""
    dropout: float = 0.0
    """The model's own dropout on attention weights."""


def scaled_dot_product(heads: AttentionInputs) -> Tensor:
    """PyTorch's fused attention, (B, H, T, D). Keys and values are repeated only where no kernel groups queries."""
    q, k, v = heads.query, heads.key, heads.value
    groups = q.shape[1] // k.shape[1]
    grouped = groups > 1 and heads.mask is None and q.shape[-1] <= _FLASH_MAX_WIDTH
    if groups > 1 and not grouped:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=heads.mask, dropout_p=heads.dropout, scale=heads.scale,
        is_causal=heads.causal and heads.mask is None, enable_gqa=grouped,
    )


def column_attention(heads: AttentionInputs, dropped: Tensor) -> Tensor:
    """DropKey on whole keys, in one extra dimension of the heads: no mask is built and every fused kernel fits.

    q' = [q, c], k' = [k, C · dropped] with scale · c · C ≈ -1e4, padded to a multiple of 8. c is a power of two
    and C has three significant bits, so both are exact in every dtype and kept keys get +0 exactly. Their sums with
    q·k are fp32 in every kernel: where *all* visible keys are dropped, logits are off by 1e-3 at most.

    Args:
        dropped: bool (B, H, T), or (B, G, T) where the heads of a group share their mask.
    """
    q, k, v = heads.query, heads.key, heads.value
    if dropped.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    size = q.shape[-1]
    extra = -(-(size + 1) // 8) * 8 - size
    q_extra, k_extra = q.new_zeros(*q.shape[:-1], extra), k.new_zeros(*k.shape[:-1], extra)
    q_extra[..., 0] = 2.0 ** round(-math.log2(heads.scale))
    k_extra[..., 0] = dropped.to(k.dtype) * _DROPPED
    wide = AttentionInputs(
        torch.cat([q, q_extra], -1), torch.cat([k, k_extra], -1), F.pad(v, (0, extra)), as_model_mask(heads.mask),
        heads.scale, heads.causal, heads.dropout,
    )
    return scaled_dot_product(wide)[..., :size]


def pair_attention(heads: AttentionInputs, dropped: Tensor) -> Tensor:
    """DropKey on any (query, key) pairs: the fused kernels that take a mask. `dropped`: bool (B, H, T, T)."""
    keep = kept_pairs(visible_pairs(heads), dropped)
    if heads.mask is None or heads.mask.dtype == torch.bool:
        mask = keep
    else:
        mask = heads.mask.masked_fill(~keep, torch.finfo(heads.mask.dtype).min)
    return scaled_dot_product(replace(heads, mask=mask, causal=False))


def plain_attention(
    heads: AttentionInputs, dropped_logits: Tensor | None = None, dropped_weights: Tensor | None = None
) -> Tensor:
    """Written out in fp32 (float64 stays), T² memory: DropAttention with its stop-gradient, and model.attention=eager.

    A constant normalizer means dw'_j = w'_j d(log w_j). So w' is computed as the softmax over kept keys, which no
    underflow of kept weights can turn into 0/0, and only its gradient goes through log w.
    """
    q, k, v = heads.query, heads.key, heads.value
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    exact = torch.promote_types(q.dtype, torch.float32)
    lowest = torch.finfo(exact).min
    scores = q.to(exact) @ k.to(exact).transpose(-1, -2) * heads.scale
    visible = visible_pairs(heads)
    if heads.mask is not None and heads.mask.dtype != torch.bool:
        scores = scores + heads.mask.masked_fill(~visible, 0.0)
    if dropped_logits is not None:
        visible = kept_pairs(visible, dropped_logits)
    scores = torch.where(visible, scores, lowest)
    if dropped_weights is None:
        weights = torch.softmax(scores, -1) * visible
    else:
        keep = kept_pairs(visible, dropped_weights)
        value = torch.softmax(torch.where(keep, scores.detach(), lowest), -1) * keep
        log_weights = torch.log_softmax(scores, -1)
        weights = value * torch.exp(log_weights - log_weights.detach())
    weights = F.dropout(weights, heads.dropout)
    return weights.to(v.dtype) @ v


def visible_pairs(heads: AttentionInputs) -> Tensor:
    """bool, broadcastable to (B, H, T, T): the (query, key) pairs that the model's own mask lets through."""
    if heads.mask is not None:
        return heads.mask if heads.mask.dtype == torch.bool else heads.mask > HIDDEN_BELOW
    tokens = heads.query.shape[2]
    every = torch.ones(tokens, tokens, dtype=torch.bool, device=heads.query.device)
    return (every.tril() if heads.causal else every)[None, None]


def kept_pairs(visible: Tensor, dropped: Tensor) -> Tensor:
    """Visible and not dropped; for a query that would be left with nothing, all it sees."""
    keep = visible & ~dropped
    return torch.where(keep.any(-1, keepdim=True), keep, visible)


def as_model_mask(mask: Tensor | None) -> Tensor | None:
    """An additive mask with what it hides at the dtype's lowest value, far below a dropped key; others as they are."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.masked_fill(mask <= HIDDEN_BELOW, torch.finfo(mask.dtype).min)
