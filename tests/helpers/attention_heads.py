"""Heads as an attention module hands them over, under the masks that models have, and every way to drop keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.adapters.sites.attention_kernels import (
    AttentionInputs,
    column_attention,
    pair_attention,
    plain_attention,
)


def heads_of(
    tokens: int = 7, size: int = 8, groups: int = 2, mask: Tensor | None = None, causal: bool = True,
    dtype: torch.dtype = torch.float32, seed: int = 0, scale: float | None = None, rows: int = 2,
) -> AttentionInputs:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, h, tokens, size, generator=random).to(dtype) for h in (4, 4 // groups, 4 // groups))
    return AttentionInputs(q, k, v, mask, size**-0.5 if scale is None else scale, causal)


def some_drops(heads: AttentionInputs, rate: float = 0.5, columns: bool = False) -> Tensor:
    """bool (B, H, T, T); with `columns` equal for all queries. The first key of head 0 is always dropped."""
    rows, count, tokens = heads.query.shape[:3]
    dropped = (
        torch.rand(rows, count, 1 if columns else tokens, tokens, generator=torch.Generator().manual_seed(3)) < rate
    )
    dropped[:, 0, :, 0] = True
    return dropped.expand(-1, -1, tokens, -1)


def visible_to(heads: AttentionInputs) -> Tensor:
    """What the model's own mask shows, from its definition."""
    rows, count, tokens = heads.query.shape[:3]
    if heads.mask is not None:
        seen = heads.mask if heads.mask.dtype == torch.bool else heads.mask > -1.0
    else:
        seen = torch.ones(tokens, tokens, dtype=torch.bool)
        seen = seen.tril() if heads.causal else seen
    return seen.expand(rows, count, tokens, tokens)


def model_masks(tokens: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """The masks that models hand over: none, left padding, packed rows as bool and as every additive convention."""
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    padded = causal & (torch.arange(tokens) >= 2)
    owner = torch.arange(tokens) >= 3
    packed = causal & (owner[:, None] == owner[None, :])
    masks: dict[str, Tensor | None] = {"none": None, "padded": padded[None, None], "packed": packed[None, None]}
    for name, low in (("min", torch.finfo(dtype).min), ("-inf", -math.inf), ("-1e4", -1e4)):
        masks[f"packed {name}"] = torch.zeros(1, 1, tokens, tokens, dtype=dtype).masked_fill(~packed, low)
    return masks


FORMS = {
    "column": lambda heads, dropped: column_attention(heads, dropped[:, :, 0]),
    "pairs": pair_attention,
    "plain logits": lambda heads, dropped: plain_attention(heads, dropped_logits=dropped),
    "plain weights": lambda heads, dropped: plain_attention(heads, dropped_weights=dropped),
}
"""Every way in which something is dropped."""
