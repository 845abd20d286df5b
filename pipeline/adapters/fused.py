"""The adapted linear as one node of the autograd graph: every member's update is added into the base's product.

Member m has tokens of its own, one after another, in x (N, I); `Update` says which:

    y = x Wᵀ + bias,    y_m += (x_m Ã_mᵀ) B̃_mᵀ,    Ã_m = A diag(a_m),    B̃_m = s_m diag(b_m) B diag(r_m)

and backwards, with g = dL/dy:

    dx = g W,    dx_m += (g_m B̃_m) Ã_m,    dÃ_m = (g_m B̃_m)ᵀ x_m,    dB̃_m = g_mᵀ (x_m Ã_mᵀ)

Masks and scale touch the small matrices only, in float32; these are then rounded to the dtype of x, in which all
products are. Beyond these nothing of the size of x or y is read or written, except where a member drops token by token:
the adapter then sees x_m with zeros, in its first product and in dÃ_m, and what it adds to dx_m has zeros in the same
places; so have x_m Ã_mᵀ and its gradient where entries of A x are dropped. Where what is kept is rescaled, s_m does it.

Kept for the backward pass: x (which the layers that read it share), the parameters, the masks (those by token with one
byte per entry), and x_m Ã_mᵀ. The last is R numbers per token, about 1 % of what a layer of a transformer keeps with
rank 16; to make it again would be one more low-rank product beside six, by its own time about 2 % of a step. W is never
kept: a 4-bit weight is dequantized again.

Products are batched over members with equally many tokens. Members of one adapter with unequally many, as draws over
rows laid end to end have, are *stacked* as long as that is small: one product with the matrices of all of them, of
which every token keeps what is its own member's; the rest is set to zero before it meets the second matrix. That is
more arithmetic and fewer calls, and calls are what small products cost. B lies as (R, O), which its gradient gains by:
most with rank 8 in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.adapters.members import kept_index, same_for_all

MOST_STACKED = 2**15
"""Tokens × columns of members that are stacked, at most: from there on arithmetic costs more than calls."""
MOST_STACKED_ACCELERATOR = 2**18
MOST_OF_4BIT_KERNELS = 1536
"""Tokens up to which bitsandbytes may multiply by 4-bit weights as they are."""


class Matrices(NamedTuple):
    """A stack of adapters of one rank, and what members that use them drop of their tokens; None = nothing."""

    A: Tensor
    """(K, R, I)."""
    B: Tensor
    """(K, O, R)."""
    dropped_inputs: Tensor | None = None
    """(N, I) bool: entries of x that the adapter does not see."""
    dropped_hidden: Tensor | None = None
    """(N, R) bool: entries of A x that are dropped."""


@dataclass(frozen=True)
class Users:
    """The M members that use a stack."""

    slots: tuple[int, ...]
    """Of each, in the stack."""
    spans: tuple[tuple[int, int], ...]
    """(start, stop) of each one's tokens in x: ascending and apart; there may be none."""
    scale: tuple[float, ...]
    """s of each."""
    columns_A: Tensor | None = None
    """a, (M, I); None = nothing is dropped, here and below."""
    rows_B: Tensor | None = None
    """b, (M, O)."""
    ranks: Tensor | None = None
    """r, (M, R or wider: members of other ranks may be)."""

    def stacked(self, rank: int, like: Tensor) -> Stack:
        """How their products are made; the adapters have this rank, and parameters like this one."""
        b: Tensor | float = self.scale[0]
        if not same_for_all(self.scale):
            b = _column(self.scale, like.dtype, like.device)
        if self.rows_B is not None:
            b = self.rows_B.unsqueeze(1) * b
        if self.ranks is not None:
            b = self.ranks[:, :rank].unsqueeze(2) * b
        a = like.new_ones(1, 1, 1) if self.columns_A is None else self.columns_A.unsqueeze(1)
        b = b if isinstance(b, Tensor) else like.new_full((1, 1, 1), b)
        shared = len(a) == len(b) == 1 and same_for_all(self.slots)
        return Stack(self.slots, shared, _blocks(self.spans, self.slots, shared, rank, like.device), a, b)


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


def adapted_linear(x: Tensor, base: nn.Module, updates: Sequence[tuple[Stack, Matrices]]) -> Tensor:
    """(…, I) -> (…, O): the base's output, the updates added. `base` is frozen, and one that `fuses`."""
    tensors: list[Tensor | None] = []
    for stack, matrices in updates:
        tensors += [matrices.A, matrices.B, stack.a, stack.b, matrices.dropped_inputs, matrices.dropped_hidden]
    stacks = [stack for stack, _ in updates]
    return _AdaptedLinear.apply(x, base, stacks, *tensors)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Block:
    """Members beside each other in one batched product: B batches with equally many tokens, each of some members."""

    members: slice
    """Among those that use the stack; all of these have the matrices of the first where it is shared."""
    tokens: slice
    batches: int
    others: Tensor | None = None
    """Where a batch has several members: (B, tokens of a batch, members of a batch · R), true where a column is not of
    the token's own member."""

    def of(self, x_NF: Tensor) -> Tensor:
        """Their part of x, (B, tokens of a batch, F): a view."""
        count = self.tokens.stop - self.tokens.start
        own_NF = x_NF if count == len(x_NF) else x_NF[self.tokens]  # on a GPU a small pass costs what its calls cost
        return own_NF.view(self.batches, count // self.batches, -1)

    def matrices(self, of_members_MRF: Tensor) -> Tensor:
        """Their matrices, (B, members of a batch · R, F): a view."""
        whole = self.members == slice(0, len(of_members_MRF))
        own_MRF = of_members_MRF if whole else of_members_MRF[self.members]
        return own_MRF.reshape(self.batches, -1, of_members_MRF.shape[-1])

    def own(self, h_BnR: Tensor, dropped_NR: Tensor | None) -> Tensor:
        """What a token has of other members' columns becomes zero, in place: products would be sums over members. So
        does what is dropped."""
        if dropped_NR is not None:
            dropped_BnR = self.of(dropped_NR)
            h_BnR.masked_fill_(dropped_BnR.repeat(1, 1, h_BnR.shape[-1] // dropped_BnR.shape[-1]), 0.0)
        return h_BnR if self.others is None else h_BnR.masked_fill_(self.others, 0.0)

    def seen(self, x_NI: Tensor, dropped_NI: Tensor | None) -> Tensor:
        """Their part of x, with zeros where entries are dropped."""
        return self.of(x_NI) if dropped_NI is None else self.of(x_NI).masked_fill(self.of(dropped_NI), 0.0)


@dataclass(frozen=True)
class Stack:
    """What the members that use a stack ask of every product, whatever their tokens are."""

    slots: tuple[int, ...]
    shared: bool
    """Whether all of them have the same matrices, masks and scale included."""
    blocks: tuple[_Block, ...]
    a: Tensor
    """(M or 1, 1, I or 1): what A is multiplied by, entry for entry."""
    b: Tensor
    """(M or 1, R or 1, O or 1): s · b · r, what Bᵀ is multiplied by."""


class _AdaptedLinear(torch.autograd.Function):
    """Of each stack it is given A, B, and what gets no gradient: what they are multiplied by, and what is dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, stacks: list[Stack], *tensors: Tensor | None) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        y = _product(base, x)  # within a function there is no graph: nothing of this is kept
        y_NO = y.reshape(-1, y.shape[-1])
        hidden: list[Tensor] = []
        for stack, (A_KRI, B_KOR, a, b, no_x, no_h) in zip(stacks, _by_stack(tensors), strict=True):
            A_MRI, B_MRO = _weighted(A_KRI, a, stack, x.dtype), _weighted(B_KOR.mT, b, stack, x.dtype)
            for block in stack.blocks:
                h_BnR = block.own(torch.bmm(block.seen(x_NI, no_x), block.matrices(A_MRI).mT), no_h)
                block.of(y_NO).baddbmm_(h_BnR, block.matrices(B_MRO))
                hidden.append(h_BnR)
        ctx.base, ctx.stacks, ctx.given = base, stacks, len(tensors)
        ctx.save_for_backward(x, *tensors, *hidden)
        return y_NO.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        x_NI, g_NO = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        dx_NI = g_NO @ _frozen_weight(ctx.base, g.dtype) if ctx.needs_input_grad[0] else None
        hidden = iter(saved[ctx.given :])
        gradients: list[Tensor | None] = []
        for stack, (A_KRI, B_KOR, a, b, no_x, no_h) in zip(ctx.stacks, _by_stack(saved[: ctx.given]), strict=True):
            A_MRI, B_MRO = _weighted(A_KRI, a, stack, x.dtype), _weighted(B_KOR.mT, b, stack, x.dtype)
            of_A, of_B = [], []
            for block in stack.blocks:
                g_BnO = block.of(g_NO)
                dh_BnR = block.own(torch.bmm(g_BnO, block.matrices(B_MRO).mT), no_h)
                of_A.append(torch.bmm(dh_BnR.mT, block.seen(x_NI, no_x)))
                of_B.append(torch.bmm(next(hidden).mT, g_BnO))
                if dx_NI is not None and no_x is None:
                    block.of(dx_NI).baddbmm_(dh_BnR, block.matrices(A_MRI))
                elif dx_NI is not None:
                    added = torch.bmm(dh_BnR, block.matrices(A_MRI))
                    block.of(dx_NI).add_(added.masked_fill_(block.of(no_x), 0.0))
            of_matrices = _collected(of_A, a, stack, A_KRI), _collected(of_B, b, stack, B_KOR.mT).mT
            gradients += [*of_matrices, None, None, None, None]
        return None if dx_NI is None else dx_NI.view(x.shape), None, None, *gradients


@lru_cache(maxsize=64)  # as `kept_index`
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def _by_stack(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    return [tensors[start : start + 6] for start in range(0, len(tensors), 6)]


@lru_cache(maxsize=64)  # every layer of a pass asks for the same
def _blocks(
    spans: tuple[tuple[int, int], ...], slots: tuple[int, ...], shared: bool, rank: int, device: torch.device
) -> tuple[_Block, ...]:
    """As few products as there can be, members without tokens left out.

    Args:
        slots: of each. Only members of one adapter are stacked, so that what is not finite stays with its own.
        shared: whether all members have the same matrices; those beside each other are then as one.
    """
    most = MOST_STACKED if device.type == "cpu" else MOST_STACKED_ACCELERATOR
    found: list[list[tuple[int, int]]] = []
    """Blocks as lists of batches, each a range of members."""
    for first, last in _neighbours(spans, slots):
        counts = [stop - start for start, stop in spans[first:last]]
        small = sum(counts) * len(counts) * rank <= most
        batches = [(m, m + 1) for m in range(first, last)]
        if shared or (len(set(counts)) > 1 and small):
            batches = [(first, last)]
        for batch in batches:
            if found and not shared and _alike(found[-1][-1], batch, spans):
                found[-1].append(batch)
            else:
                found.append([batch])
    return tuple(_block(batches, spans, shared, rank, device) for batches in found)


def _neighbours(spans: Sequence[tuple[int, int]], slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of members of one adapter that have tokens, which follow each other."""
    first: int | None = None
    for m, (start, stop) in enumerate(spans):
        goes_on = first is not None and start < stop and slots[m] == slots[first] and start == spans[m - 1][1]
        if first is not None and not goes_on:
            yield first, m
        if not goes_on:
            first = m if start < stop else None
    if first is not None:
        yield first, len(spans)


def _alike(one: tuple[int, int], other: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Whether two batches of members follow each other, and have equally many members and tokens."""
    size_of_one, size_of_other = (spans[last - 1][1] - spans[first][0] for first, last in (one, other))
    follow = one[1] == other[0] and spans[one[1] - 1][1] == spans[other[0]][0]
    return follow and one[1] - one[0] == other[1] - other[0] and size_of_one == size_of_other


def _block(
    batches: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], shared: bool, rank: int, device: torch.device
) -> _Block:
    (first, second), last = batches[0], batches[-1][1]
    tokens = slice(spans[first][0], spans[last - 1][1])
    if shared:
        return _Block(slice(0, 1), tokens, 1)
    members = second - first
    others: Tensor | None = None
    if members > 1:
        counts = torch.tensor([stop - start for start, stop in spans[first:last]])
        of_token = torch.arange(last - first).repeat_interleave(counts).view(len(batches), -1, 1) % members
        of_column = torch.arange(members).repeat_interleave(rank)
        others = (of_token != of_column).to(device)
    return _Block(slice(first, last), tokens, len(batches), others)


def _weighted(matrices_KRF: Tensor, by: Tensor, stack: Stack, dtype: torch.dtype) -> Tensor:
    """The members' matrices times `by`, (M, R, F): multiplied, rounded to `dtype` and laid out in one pass.

    (1, R, F) of a shared stack.
    """
    slots = stack.slots
    if same_for_all(slots):
        chosen_MRF = matrices_KRF[slots[0] : slots[0] + 1]
    else:
        chosen_MRF = matrices_KRF.index_select(0, kept_index(slots, matrices_KRF.device))
    different = max(chosen_MRF.shape[0], by.shape[0])
    out = torch.mul(chosen_MRF, by, out=chosen_MRF.new_empty(different, *chosen_MRF.shape[1:], dtype=dtype))
    return out if stack.shared or different == len(slots) else out.expand(len(slots), -1, -1)


def _collected(parts: Sequence[Tensor], by: Tensor, stack: Stack, of: Tensor) -> Tensor:
    """Gradient (K, R, F) of the matrices `of` a stack, in their dtype, from those of its blocks' weighted ones."""
    total: Tensor | None = None
    for block, part in zip(stack.blocks, parts, strict=True):
        slots = stack.slots[block.members]
        d_KRF = part.to(of.dtype).view(-1, *of.shape[1:]) * (by if by.shape[0] == 1 else by[block.members])
        if same_for_all(slots):
            d_KRF, slots = d_KRF.sum(0, keepdim=True), slots[:1]
        if len(parts) == 1 and slots == tuple(range(of.shape[0])):
            return d_KRF
        total = of.new_zeros(of.shape) if total is None else total
        total.index_add_(0, kept_index(slots, of.device), d_KRF)
    return of.new_zeros(of.shape) if total is None else total


def _is_4bit(base: nn.Module) -> bool:
    return type(base).__name__ == "Linear4bit"


def _product(base: nn.Module, x: Tensor) -> Tensor:
    """x Wᵀ + bias. Of many tokens on a GPU bitsandbytes makes it like this, too, in more calls."""
    if not _is_4bit(base) or x.device.type == "cpu" or x.numel() <= MOST_OF_4BIT_KERNELS * x.shape[-1]:
        return base(x)  # type: ignore[no-any-return]
    return nn.functional.linear(x, _frozen_weight(base, x.dtype), base.bias)  # type: ignore[arg-type]


def _frozen_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """W (O, I); of a 4-bit layer a copy, dequantized now."""
    if not _is_4bit(base):
        return base.weight.to(dtype)  # type: ignore[operator, return-value, union-attr]
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(base.weight).to(dtype)
