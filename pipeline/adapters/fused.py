"""The adapted linear as one node of the autograd graph: every member's update is added into the base's product.

Member m has tokens of its own, one after another, in x (N, I); `Update` says which:

    y = x Wᵀ + bias,    y_m += (x_m Ã_mᵀ) B̃_mᵀ,    Ã_m = A diag(a_m),    B̃_m = s_m diag(b_m) B diag(r_m)

and backwards, with g = dL/dy:

    dx = g W,    dx_m += (g_m B̃_m) Ã_m,    dÃ_m = (g_m B̃_m)ᵀ x_m,    dB̃_m = g_mᵀ (x_m Ã_mᵀ)

Masks and scale touch the small matrices only, in float32; these are then rounded to the dtype of x, in which all
products are. Beyond these nothing of the size of x or y is read or written.

Kept for the backward pass: x (which the layers that read it share), the parameters, the masks, and x_m Ã_mᵀ. The last
is R numbers per token, about 1 % of what a layer of a transformer keeps, and making it again would cost 2 % of a
training step (measured: SmolLM2-135M, rank 16). W is never kept: a 4-bit weight is dequantized again.

Products are batched over members: on CPUs, for 1 to 8 members and ranks 8 to 64, bmm took 0.3 to 1.0 times as long as
a product per member, and a half to a fifth of one product with all members' matrices stacked. Hidden values lie
(R, tokens) and B (R, O): with rank 8 the products are up to 3 times as fast as the other way round, else equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.adapters.members import as_index, same_for_all


class Matrices(NamedTuple):
    """A stack of adapters of one rank, and what M members that use them drop; None = nothing."""

    A: Tensor
    """(K, R, I)."""
    B: Tensor
    """(K, O, R)."""
    columns_A: Tensor | None = None
    """a, (M, I)."""
    rows_B: Tensor | None = None
    """b, (M, O)."""
    ranks: Tensor | None = None
    """r, (M, R or wider: members of other ranks may be)."""


@dataclass(frozen=True)
class Users:
    """The M members that use a stack."""

    slots: tuple[int, ...]
    """Of each, in the stack."""
    spans: tuple[tuple[int, int], ...]
    """(start, stop) of each one's tokens in x: ascending and apart; there may be none."""
    scale: tuple[float, ...]
    """s of each."""


@dataclass(frozen=True)
class Block:
    """Members beside each other with equally many tokens: one batched product."""

    members: slice
    tokens: slice

    def of(self, x_NF: Tensor) -> Tensor:
        """Their part of x, (members, tokens of each, F): a view."""
        count = self.members.stop - self.members.start
        each = (self.tokens.stop - self.tokens.start) // count
        return x_NF[self.tokens].view(count, each, x_NF.shape[1])


def fuses(base: nn.Module, x: Tensor) -> bool:
    """Whether `base` is known here: a plain or bitsandbytes 4-bit linear that computes in the dtype of x.

    transformers loads a base in its compute dtype, so x is never cast: layers that read one x have no cast to share.
    Not known are 8-bit and transposed linears, and a layer with a forward of its own.
    """
    if not isinstance(base, nn.Linear) or "forward" in vars(base):
        return False
    if _is_4bit(base):
        return base.compute_dtype in (None, x.dtype)
    return type(base).forward is nn.Linear.forward and base.weight.dtype == x.dtype


def adapted_linear(x: Tensor, base: nn.Module, updates: Sequence[tuple[Users, Matrices]]) -> Tensor:
    """(…, I) -> (…, O): the base's output, the updates added. `base` is frozen, and one that `fuses`."""
    users = tuple(of_stack for of_stack, _ in updates)
    tensors = [tensor for _, matrices in updates for tensor in matrices]
    return _AdaptedLinear.apply(x, base, users, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, users: tuple[Users, ...], *tensors: Tensor | None) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        y = base(x)  # within a function there is no graph: nothing of this is kept
        y_NO = y.reshape(-1, y.shape[-1])
        hidden: list[Tensor] = []
        for of_stack, matrices in zip(users, _by_stack(tensors), strict=True):
            A_MRI, B_MRO = _factors(of_stack, matrices, x.dtype)
            for block in _blocks(of_stack.spans, len(A_MRI)):
                h_MRn = torch.bmm(A_MRI[block.members], block.of(x_NI).mT)
                block.of(y_NO).baddbmm_(h_MRn.mT, B_MRO[block.members])
                hidden.append(h_MRn)
        ctx.base, ctx.users, ctx.given = base, users, len(tensors)
        ctx.save_for_backward(x, *tensors, *hidden)
        return y_NO.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        x_NI, g_NO = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        dx_NI = g_NO @ _frozen_weight(ctx.base).to(g.dtype) if ctx.needs_input_grad[0] else None
        hidden = iter(saved[ctx.given :])
        gradients: list[Tensor | None] = []
        for of_stack, matrices in zip(ctx.users, _by_stack(saved[: ctx.given]), strict=True):
            A_MRI, B_MRO = _factors(of_stack, matrices, x.dtype)
            dA_MRI, dB_MRO = torch.zeros_like(A_MRI), torch.zeros_like(B_MRO)
            for block in _blocks(of_stack.spans, len(A_MRI)):
                g_MnO = block.of(g_NO)
                dh_MRn = torch.bmm(B_MRO[block.members], g_MnO.mT)
                dA_MRI[block.members].baddbmm_(dh_MRn, block.of(x_NI))
                dB_MRO[block.members].baddbmm_(next(hidden), g_MnO)
                if dx_NI is not None:
                    block.of(dx_NI).baddbmm_(dh_MRn.mT, A_MRI[block.members])
            a, b = _coefficients(of_stack, matrices)
            dB_KRO = _collected(dB_MRO, b, of_stack.slots, matrices.B)
            gradients += [_collected(dA_MRI, a, of_stack.slots, matrices.A), dB_KRO.mT, None, None, None]
        return None if dx_NI is None else dx_NI.view(x.shape), None, None, *gradients


def _by_stack(tensors: Sequence[Tensor | None]) -> list[Matrices]:
    size = len(Matrices._fields)
    return [Matrices(*tensors[start : start + size]) for start in range(0, len(tensors), size)]  # type: ignore[arg-type]


def _blocks(spans: Sequence[tuple[int, int]], matrices: int) -> list[Block]:
    """As few batches as there can be, members without tokens left out.

    Args:
        matrices: 1 where all members have the same: they are as one member then.
    """
    blocks: list[Block] = []
    for m, (start, stop) in enumerate(spans):
        if start == stop:
            continue
        last = blocks[-1] if blocks else None
        if last is not None and last.tokens.stop == start and (matrices == 1 or _alike(last, m, stop - start)):
            blocks[-1] = Block(slice(last.members.start, 1 if matrices == 1 else m + 1), slice(last.tokens.start, stop))
        else:
            blocks.append(Block(slice(0, 1) if matrices == 1 else slice(m, m + 1), slice(start, stop)))
    return blocks


def _alike(block: Block, m: int, tokens: int) -> bool:
    count = block.members.stop - block.members.start
    return block.members.stop == m and (block.tokens.stop - block.tokens.start) == count * tokens


def _factors(users: Users, matrices: Matrices, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ã (M, R, I) and B̃ᵀ (M, R, O) in `dtype`; (1, R, ·) where all members have the same."""
    of_A, of_B = _coefficients(users, matrices)
    A_MRI = _weighted(matrices.A, of_A, users.slots, dtype)
    B_MRO = _weighted(matrices.B.mT, of_B, users.slots, dtype)
    members = max(len(A_MRI), len(B_MRO))
    return A_MRI.expand(members, -1, -1), B_MRO.expand(members, -1, -1)


def _coefficients(users: Users, matrices: Matrices) -> tuple[Tensor, Tensor]:
    """What the members' A (M, R, I) and Bᵀ (M, R, O) are multiplied by, entry for entry: a, and s · b · r."""
    A, B, a_MI, b_MO, r_MR = matrices
    if same_for_all(users.scale):
        of_B = B.new_full((1, 1, 1), users.scale[0])
    else:
        of_B = torch.tensor(users.scale, dtype=B.dtype, device=B.device).view(-1, 1, 1)
    if b_MO is not None:
        of_B = of_B * b_MO.unsqueeze(1)
    if r_MR is not None:
        of_B = of_B * r_MR[:, : A.shape[1]].unsqueeze(2)
    return A.new_ones(1, 1, 1) if a_MI is None else a_MI.unsqueeze(1), of_B


def _weighted(stack_KRF: Tensor, by: Tensor, slots: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The members' matrices times `by`: multiplied, rounded to `dtype` and laid out in one pass."""
    if same_for_all(slots):
        chosen_MRF = stack_KRF[slots[0]].unsqueeze(0)
    else:
        chosen_MRF = stack_KRF.index_select(0, as_index(slots, stack_KRF.device))
    out = torch.empty(max(len(chosen_MRF), len(by)), *chosen_MRF.shape[1:], dtype=dtype, device=by.device)
    return torch.mul(chosen_MRF, by, out=out)


def _collected(d_MRF: Tensor, by: Tensor, slots: tuple[int, ...], stack: Tensor) -> Tensor:
    """Gradient (K, R, F) of the stack, in its dtype, from those of the members' weighted matrices."""
    d_MRF = d_MRF.to(stack.dtype) * by
    if same_for_all(slots):
        d_MRF, slots = d_MRF.sum(0, keepdim=True), slots[:1]
    if slots == tuple(range(len(stack))):
        return d_MRF
    return d_MRF.new_zeros(len(stack), *d_MRF.shape[1:]).index_add_(0, as_index(slots, d_MRF.device), d_MRF)


def _is_4bit(base: nn.Module) -> bool:
    return type(base).__name__ == "Linear4bit"


def _frozen_weight(base: nn.Module) -> Tensor:
    """W (O, I); of a 4-bit layer a copy, dequantized now."""
    if not _is_4bit(base):
        return base.weight  # type: ignore[return-value]
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(base.weight)
