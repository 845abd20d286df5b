"""Rows laid end to end: no layer computes padding, and members need not have equally many tokens.

What works token by token sees one row of N tokens. Attention works row by row: there the tokens are sorted into padded
rows and back. Padding is on the right, in the future of every real query, so causal attention needs no mask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.adapters.members import AttentionRows, EndToEnd, MemberPlan, RowKeys
from pipeline.randomness import key64

GROUPS = 3
"""Groups of similar rows, at the most, that attention computes one after another."""


def lay_end_to_end(
    plan: MemberPlan, lengths: Sequence[Sequence[int]], device: torch.device, example: Tensor | None = None
) -> MemberPlan:
    """`plan` for rows that follow one another in one row of N tokens, member-major.

    Args:
        lengths: of each member the tokens of its rows; a row is one example.
        example: (R,) int64 identities of the rows' examples; None where no mask is keyed by them.
    """
    size = np.array([length for own in lengths for length in own])
    owner = np.repeat(np.arange(plan.size), [len(own) for own in lengths])
    end, tokens = size.cumsum(), int(size.sum())
    draws = np.array([-1 if member.draw is None else member.draw for member in plan.members])
    seeds = tuple(key64(key.seed, key.phase, "activation") for key in plan.keys)

    def on_device(numbers: NDArray[np.intp]) -> Tensor:
        return torch.from_numpy(numbers).to(device)

    sources: list[NDArray[np.intp]] = []
    groups: list[AttentionRows] = []
    for rows in _alike(size):
        column = np.arange(size[rows].max())
        first = (end - size)[rows, None]
        sources.append(np.where(column < size[rows, None], first + column, tokens).ravel())
        counts, keys = tuple(np.bincount(owner[rows], minlength=plan.size).tolist()), None
        if example is not None:
            branch, position = on_device(draws[owner[rows]]), on_device(column).expand(len(rows), -1)
            keys = RowKeys(seeds, branch, example[on_device(rows)], position, counts)
        groups.append(AttentionRows(counts, len(column), keys))
    source = np.concatenate(sources)
    place = source.argsort(kind="stable")[:tokens]  # padding comes last
    sums, row_keys = tuple(sum(own) for own in lengths), None
    if example is not None:
        row = on_device(np.repeat(np.arange(len(size)), size))
        position = on_device(np.arange(tokens) - np.repeat(end - size, size)).unsqueeze(1)
        row_keys = RowKeys(seeds, on_device(draws[owner])[row], example[row], position, sums)
    laid = EndToEnd(sums, tuple(groups), on_device(source), on_device(place))
    return replace(plan, rows=max(len(own) for own in lengths), row_keys=row_keys, end_to_end=laid)


def _alike(size: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Indices in groups, each in order: what is longer than half of the longest, than half of that, and the rest."""
    group = np.minimum(np.log2(size.max() / size), GROUPS - 1).astype(int)
    return [np.flatnonzero(group == g) for g in np.unique(group)]


def attend_by_rows(
    laid: EndToEnd, query: Tensor, key: Tensor, value: Tensor,
    attend: Callable[[AttentionRows, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention over rows laid end to end: (1, H, N, D), (1, G, N, D)² -> (1, N, H, D).

    Args:
        attend: causal attention of one group of rows: (R, H, T, D), (R, G, T, D)² -> (R, H, T, D).
    """
    padded = [_Sorted.apply(x[0].transpose(0, 1), laid.source, laid.place) for x in (query, key, value)]
    done, start = [], 0
    for group in laid.groups:
        rows = sum(group.counts)
        end = start + rows * group.length
        own = [x[start:end].view(rows, group.length, *x.shape[1:]).transpose(1, 2) for x in padded]
        done.append(attend(group, *own).transpose(1, 2).flatten(0, 1))
        start = end
    whole = done[0] if len(done) == 1 else torch.cat(done)
    return _Sorted.apply(whole, laid.place, laid.source).unsqueeze(0)  # type: ignore[no-any-return]


class _Sorted(torch.autograd.Function):
    """x[index], where an index beyond the end is a zero. `back` is the index that undoes it, and so its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        return _select(x, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        index, back = ctx.saved_tensors
        return _select(gradient, back), None, None


def _select(x: Tensor, index: Tensor) -> Tensor:
    padded = x if len(index) <= len(x) else torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return padded.index_select(0, index)
