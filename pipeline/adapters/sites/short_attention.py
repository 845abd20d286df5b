"""Attention of short rows on CPUs, written out: products, a softmax, products.

PyTorch's fused CPU kernel works in blocks made for long rows, and its backward pass in bfloat16 is slow below a few
hundred tokens. Weights (B, H, T, T) are kept for the backward pass here, which at the lengths of `LONGEST` is little
beside what a layer keeps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST: dict[torch.dtype, int] = {torch.float32: 64, torch.bfloat16: 128}
"""dtype -> tokens up to which it is the faster one on CPUs. A fixed rule, not a measurement of each process: a run that
is resumed, and every process of one, must take the same kernel.

Measured, ms of the fused kernel -> ms here, of 1,024 tokens, forward and backward (AMD EPYC with AVX512-BF16, one
thread, 9 heads over 3, of 64 features, left padding): bfloat16 43 -> 5 (T = 16), 43 -> 7 (32), 46 -> 10 (64),
47 -> 14 (128), 64 -> 36 (256, whose forward pass alone is 13 -> 30); float32 11 -> 7, 14 -> 9, 14 -> 11, 21 -> 19,
36 -> 41. Without a mask bfloat16 gains as much, and float32 nothing. float16 is left to PyTorch.
"""


def is_short(query: Tensor, key: Tensor) -> bool:
    """Whether a row (B, H, T, D) of whole sequences is short enough."""
    tokens = query.shape[2]
    return query.device.type == "cpu" and tokens == key.shape[2] and tokens <= LONGEST.get(query.dtype, 0)


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """softmax(scale · QKᵀ + mask) V, as `torch.nn.functional.scaled_dot_product_attention` defines it.

    Logits and their softmax are float32 (float64 stays), the weights are rounded to the dtype of the values. Those of
    a query that sees nothing (a bool mask, or one of -inf) are 0.

    Args:
        query: (B, H, T, D); key and value (B, G, T, ·), H a multiple of G.
        mask: None, bool (True = visible) or additive, broadcastable to (B, H, T, T); it gets no gradient.
        causal: where there is no mask, whether a query sees only itself and earlier keys.
    """
    return _ShortAttention.apply(query, key, value, mask, scale, causal)  # type: ignore[no-any-return, no-untyped-call]


class _ShortAttention(torch.autograd.Function):
    """The queries that share a key head are one batch entry, so that keys and values are never repeated."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        rows, heads, tokens, _ = query.shape
        q, k, v = (x.reshape(rows * key.shape[1], -1, x.shape[-1]) for x in (query, key, value))
        exact = torch.promote_types(q.dtype, torch.float32)
        logits = torch.bmm(q.to(exact), k.to(exact).mT).mul_(scale)
        by_head = logits.view(rows, heads, tokens, tokens)
        hidden = None
        if mask is None and causal:
            by_head.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1), -math.inf)
        elif mask is not None:
            hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
            if mask.dtype != torch.bool:
                by_head.add_(mask)
            by_head.masked_fill_(hidden, torch.finfo(exact).min)
        weights = torch.softmax(logits, -1).to(v.dtype)
        if hidden is not None:
            weights.view_as(by_head).masked_fill_(hidden, 0.0)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return torch.bmm(weights, v).view(rows, heads, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        of_out = gradient.reshape(len(q), -1, gradient.shape[-1])
        of_weights = torch.bmm(of_out, v.mT)
        # what the node of `torch.softmax` calls: one pass, sums in float32
        of_logits = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        found = (
            torch.bmm(of_logits, k).mul_(ctx.scale), torch.bmm(of_logits.mT, q).mul_(ctx.scale),
            torch.bmm(weights.mT, of_out),
        )
        return *(x.view(shape) for x, shape in zip(found, ctx.shapes, strict=True)), None, None, None
