"""HiddenCut: entries of the hidden representation of a feed-forward network are dropped (arXiv 2403.00812).

The site is the input of the down projection, for the base weight and its adapter alike, whether or not that linear is
adapted or quantized. Kept entries are multiplied by 1/(1-rate) (`inverse`) or left alone (`none`). A read-out without
masks multiplies nothing in either case: inference has no HiddenCut, and a factor there would change the frozen base,
which a stored adapter cannot carry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.masks import dropped_hidden
from pipeline.adapters.members import MemberAxis
from pipeline.adapters.sites.anatomy import down_projections
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.randomness import key64

POSITION = "ffn_hidden"
_ATTRIBUTE = "loradrop_hidden_cut"


def install_ffn_sites(model: nn.Module, axis: MemberAxis, adapter: int, spec: AdapterSpec, layer_count: int) -> None:
    """Let the feed-forward networks of a checked model drop what the spec says; nothing where there is no site.

    Call it after the linears have been wrapped: the mask belongs in front of the wrapper.
    """
    for name, module in down_projections(model).items():
        site = spec.sites_of(name, layer_count).get(POSITION)
        if site is None:
            continue
        if not hasattr(module, _ATTRIBUTE):
            setattr(module, _ATTRIBUTE, HiddenCut(axis, name, {}, key64(name, POSITION)))
            module.register_forward_pre_hook(getattr(module, _ATTRIBUTE))
        getattr(module, _ATTRIBUTE).sites[adapter] = site


def remove_ffn_sites(model: nn.Module, adapter: int) -> None:
    """Forget an adapter."""
    for module in down_projections(model).values():
        if hasattr(module, _ATTRIBUTE):
            getattr(module, _ATTRIBUTE).sites.pop(adapter, None)


@dataclass
class HiddenCut:
    """Forward pre-hook of one down projection."""

    axis: MemberAxis
    name: str
    sites: dict[int, Site]
    """adapter -> site."""
    key: int
    """64-bit key of (layer, position)."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Replace the (M·B, T, F) input by its masked form; None (no change) where no row has a mask.

        Raises:
            MemberAxisError: the rows are not the plan's, or the plan has no row keys.
        """
        if self.axis.current is None or not self.sites:
            return None
        x = args[0]
        plan = self.axis.plan_for(x.shape[0], self.name, x[..., 0].numel())
        sites = [self.sites.get(m.adapter) if m.draw is not None else None for m in plan.members]  # type: ignore[arg-type]
        if not any(sites):
            return None
        keys = plan.keys_for(x[0, ..., 0].numel() * plan.rows, self.name)
        if plan.end_to_end is not None:
            x = x.transpose(0, 1)  # every token is a row, as its keys have it
        parts: list[Tensor] = []
        start = 0
        for site, members in groupby(sites):
            end = start + len(list(members))
            rows = keys.rows_of(start, end)
            part = x[rows]
            if site is not None:
                dropped = partial(dropped_hidden, keys, rows, self.key, x.shape[-1], site)
                part = drop(part, dropped, 1.0 / (1.0 - site.rate) if site.compensation == "inverse" else 1.0)
            parts.append(part)
            start = end
        done = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (done if plan.end_to_end is None else done.transpose(0, 1), *args[1:])


def drop(x: Tensor, dropped: Callable[[], Tensor], kept: float) -> Tensor:
    """x with dropped entries 0 and kept ones × `kept`. The mask is computed again in the backward pass, not stored."""
    return _Drop.apply(x, dropped, kept)  # type: ignore[no-any-return]


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Callable[[], Tensor], kept: float) -> Tensor:
        ctx.dropped, ctx.kept = dropped, kept
        return x.masked_fill(dropped(), 0.0) * kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.masked_fill(ctx.dropped(), 0.0) * ctx.kept, None, None
