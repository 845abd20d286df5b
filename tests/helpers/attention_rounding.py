"""How far a kernel that sums in float32 may be from dense float64 attention: bounds that hold on every processor.

To first order in u = 2^-24, and 1 % for the rest. In any order of summation, a logit (D products, a scale) is off by
(D + 4) u · reach, reach = max scale Σ|q||k|. A weight exp(s - max s) ÷ Σ exp: twice that, for numerator and
denominator; the rounding of s - max s, 2 reach · u; 4 exponentials of 20 ulp each, the coarsest in PyTorch's CPU
kernels (numerator, denominator, and both rescaled for a later maximum); a sum of T terms. The product with the values
sums T terms more. 16-bit kernels also round the weights before that product, and the result, to their own u.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.attention_reference import dense_attention


def relative_rounding(q: Tensor, k: Tensor, scale: float) -> float:
    """Relative error of a weight, of a weighted sum of values, and of a sum of D products, whichever is largest."""
    q, k = q.detach().double().abs(), k.detach().double().abs()
    reach = scale * float((q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT).max())
    return float(2.0**-24 * ((2 * q.shape[-1] + 10) * reach + 4 * 40 + 2 * k.shape[2] + q.shape[-1]))


def output_bound(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor, dropped: Tensor) -> Tensor:
    """(B, H, T, D) for `dense_attention` of the same arguments, whose `logits` are `dropped`."""
    storage = 0.0 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps / 2
    spread = dense_attention(q, k, v.abs(), scale, visible, logits=dropped).detach()
    return 1.01 * (relative_rounding(q, k, scale) + 2 * storage) * spread


def gradient_bounds(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor, dropped: Tensor, direction: Tensor, constant: bool
) -> list[Tensor]:
    """For the gradients of Σ direction · output with respect to q, k and v in float32.

    With p the weights, g_ij = direction_i · v_j, and w = p, or the weights with nothing dropped where the normalizer is
    `constant`: dL/ds = p g - w Σ p g, dL/dq = scale · dL/ds k, dL/dk = scale · dL/dsᵀ q, dL/dv = pᵀ direction. No
    product has more than four factors, each off by `relative_rounding` at most; absolute values bound what cancels.
    """
    rows, groups, tokens = k.shape[:3]
    repeats = q.shape[1] // groups
    units = torch.eye(tokens).expand(rows, groups, tokens, tokens)
    p = dense_attention(q, k, units, scale, visible, logits=dropped).detach()
    w = dense_attention(q, k, units, scale, visible).detach() if constant else p
    aq, ak, av, step = (x.detach().double().abs() for x in (q, k, v, direction))
    ak, av = (x.repeat_interleave(repeats, dim=1) for x in (ak, av))
    g = step @ av.mT
    slopes = scale * (p * g + w * (p * g).sum(-1, keepdim=True))
    of_keys = [x.unflatten(1, (groups, repeats)).sum(2) for x in (slopes.mT @ aq, p.mT @ step)]
    return [1.01 * 4 * relative_rounding(q, k, scale) * x for x in (slopes @ ak, *of_keys)]
