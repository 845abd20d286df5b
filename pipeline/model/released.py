"""4-bit linears that do not hold on to their weight between the forward and the backward pass.

bitsandbytes' autograd function keeps the weight itself in its context. Under ZeRO-3 that is the gathered copy: at the
end of a forward pass every process would hold the whole base, also with activation checkpointing. Here the context
keeps the module, whose weight is gathered again when its backward pass begins.
"""

from __future__ import annotations

import types
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn


class _MatMul(torch.autograd.Function):
    """y = x Wᵀ + b with frozen, packed W: forward and backward as in bitsandbytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        bias = None if module.bias is None else module.bias.to(x.dtype)  # type: ignore[operator]
        return bnb.matmul_4bit(x, module.weight, bias=bias, quant_state=module.weight.quant_state)  # type: ignore

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        weight = ctx.module.weight
        W_OI = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return gradient @ W_OI.to(gradient.dtype), None


def release_weights(model: nn.Module) -> int:
    """Have every bitsandbytes 4-bit linear of `model` let go of its weight; returns how many there are."""
    count = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def _forward(module: bnb.nn.Linear4bit, x: Tensor) -> Tensor:
    return _MatMul.apply(x.to(module.compute_dtype or x.dtype), module).to(x.dtype)
