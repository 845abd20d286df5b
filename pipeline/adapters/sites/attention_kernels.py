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

from pipeline.adapters.sites.short_attention import is_short, short_attention

HIDDEN_BELOW = -4096.0
"""An additive mask this low hides a key: below any logit, above what the models' finite masks hold (-1e4 or less)."""
_DROPPED = -10240.0
"""C, exact in bfloat16 and float16; scale · c · C is between -7240 and -14482.

In float32 exp(x) is exactly 0 below x = -104. So a dropped key has weight 0 unless its logit is 7136 above those of all
kept keys; 16-bit kernels sum in float32 and have the same limit.
"""
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
    """The faster of PyTorch's fused attention and that of `short_attention`, (B, H, T, D).

    For the fused one keys and values are repeated only where no kernel groups queries.
    """
    q, k, v = heads.query, heads.key, heads.value
    if heads.dropout == 0.0 and is_short(q, k):
        return short_attention(q, k, v, heads.mask, heads.scale, heads.causal)
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

    q' = [q, c · keeps], k' = [k, C · dropped], padded to a multiple of 8; keeps is 0 for a query all of whose visible
    keys are dropped and 1 else. c ≈ 1 / scale is a power of two and C has three significant bits, so both are exact in
    every dtype. Kept keys, and all keys of a query that keeps none, get +0: their logits are those of the kernel
    without masks, no rounding added. Dropped keys get about -1e4 and weight exactly 0, whatever that sum is rounded to.

    Args:
        dropped: bool (B, H, T), or (B, G, T) where the heads of a group share their mask.
    """
    q, k, v = heads.query, heads.key, heads.value
    keeps = keeps_a_key(heads, dropped)
    if dropped.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    size = q.shape[-1]
    extra = -(-(size + 1) // 8) * 8 - size
    q_extra, k_extra = q.new_zeros(*q.shape[:-1], extra), k.new_zeros(*k.shape[:-1], extra)
    q_extra[..., 0] = keeps.to(q.dtype) * 2.0 ** round(-math.log2(heads.scale))
    k_extra[..., 0] = dropped.to(k.dtype) * _DROPPED
    wide = replace(
        heads, query=torch.cat([q, q_extra], -1), key=torch.cat([k, k_extra], -1), value=F.pad(v, (0, extra))
    )
    return scaled_dot_product(wide)[..., :size]


def keeps_a_key(heads: AttentionInputs, dropped: Tensor) -> Tensor:
    """bool (B, H, T or 1): the queries that see a key which `dropped` (as in `column_attention`) leaves.

    Where the model has no mask this costs a running sum, else a product with the mask (B, 1, T, T): nothing is made
    per head, query and key.
    """
    kept = ~dropped
    if heads.mask is None:
        found = kept.cumsum(-1) > 0 if heads.causal else kept.any(-1, keepdim=True)
    else:
        visible = visible_pairs(heads)
        if visible.shape[1] == 1:  # counts: sums of 0 and 1 are above 0 in every dtype where one of them is
            found = (visible[:, 0].to(heads.query.dtype) @ kept.mT.to(heads.query.dtype)).mT > 0
        else:
            found = (visible & kept.repeat_interleave(visible.shape[1] // kept.shape[1], dim=1).unsqueeze(2)).any(-1)
    return found.repeat_interleave(heads.query.shape[1] // found.shape[1], dim=1)


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
