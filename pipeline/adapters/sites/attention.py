"""Attention sites: DropKey and DropAttention (arXiv 2403.00812) on the base model's own attention.

One implementation name is registered with transformers, together with its mask function: a name without one silently
gets no mask, and padding and packing isolation vanish. Only the configuration of the model at hand is switched to it.
Which rows are masked, and how, is the active plan's business; without a plan, or for rows without a draw, the
attention is the stock one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.end_to_end import attend_by_rows
from pipeline.adapters.masks import dropped_keys, dropped_pairs
from pipeline.adapters.members import AttentionRows, MemberAxis, MemberAxisError, MemberPlan, RowKeys
from pipeline.adapters.sites.anatomy import UNKNOWN_TERMS, attention_modules
from pipeline.adapters.sites.attention_kernels import (
    AttentionInputs,
    column_attention,
    pair_attention,
    plain_attention,
    scaled_dot_product,
)
from pipeline.adapters.sites.short_attention import is_short
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import ATTENTION_POSITIONS, Site
from pipeline.errors import ConfigError
from pipeline.randomness import key64

NAME = "loradrop"
"""The implementation's name in transformers."""
_ATTRIBUTE = "loradrop_sites"

KeyedSite = tuple[Site, int]
"""A site and the 64-bit key of (layer, position)."""


def install_attention_sites(
    model: nn.Module, axis: MemberAxis, adapter: int, spec: AdapterSpec, layer_count: int
) -> None:
    """Let the attention of a checked model drop what the spec's attention sites say.

    Where there are none, a model on a CPU is still switched to the implementation here, for its short rows.
    """
    if not any(site.position in ATTENTION_POSITIONS and site.rate > 0 for site in spec.sites):
        if _gains_on_short_rows(model):
            register()
            model.set_attn_implementation(NAME)  # type: ignore[operator]
        return
    register()
    plain = model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    for name, module in attention_modules(model).items():
        if not hasattr(module, _ATTRIBUTE):
            setattr(module, _ATTRIBUTE, AttentionSites(axis, name, plain))
        found = tuple(
            (site, key64(name, position)) for position, site in spec.sites_of(name, layer_count).items()
            if position in ATTENTION_POSITIONS
        )
        if found:
            getattr(module, _ATTRIBUTE).sites[adapter] = found


def remove_attention_sites(model: nn.Module, adapter: int) -> None:
    """Forget an adapter."""
    for module in attention_modules(model).values():
        if hasattr(module, _ATTRIBUTE):
            getattr(module, _ATTRIBUTE).sites.pop(adapter, None)


def install_end_to_end(model: nn.Module, axis: MemberAxis) -> None:
    """Let the attention of a model that has no `padding_reason` serve rows laid end to end."""
    register()
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    for name, module in attention_modules(model).items():
        if not hasattr(module, _ATTRIBUTE):
            setattr(module, _ATTRIBUTE, AttentionSites(axis, name, plain=False))


def _gains_on_short_rows(model: nn.Module) -> bool:
    """Whether `short_attention` can serve: PyTorch's attention on a CPU (or on no device: what memory plans trace)."""
    can_set = getattr(type(model), "_can_set_attn_implementation", lambda: False)
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa" or not can_set():
        return False
    return next(model.parameters()).device.type in ("cpu", "meta")


def register() -> None:
    """Make the implementation known to transformers, its masks being those of `sdpa`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, member_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass
class Drops:
    """What one attention call drops: bool (B, H or G, 1, T) for whole keys, (B, H, T, T) for pairs."""

    logits: Tensor | None = None
    """DropKey, and DropAttention without stop-gradient: the same thing."""
    weights: Tensor | None = None
    """DropAttention with stop-gradient."""


@dataclass
class AttentionSites:
    """The sites of one attention module, by adapter."""

    axis: MemberAxis
    name: str
    plain: bool
    """Whether everything is computed unfused (model.attention=eager)."""
    sites: dict[int, tuple[KeyedSite, ...]] = field(default_factory=dict)

    def drops(self, query: Tensor, key: Tensor) -> Drops | None:
        """The masks of this call: query (B, H, T, D), key (B, G, T, D); None where no row has one.

        Raises:
            MemberAxisError: the rows are not the plan's, the plan has no row keys, or keys come from a cache.
        """
        if self.axis.current is None or not self.sites:
            return None
        plan = self.axis.plan_for(query.shape[0], self.name)
        if not any(self._of_members(plan)):
            return None
        if query.shape[2] != key.shape[2]:
            raise MemberAxisError(f"{self.name} drops keys: run whole sequences, without a cache (use_cache=False)")
        keys = plan.keys_for(plan.rows * query.shape[2], self.name)
        return self._drops(plan, keys, (query.shape[1], key.shape[1]))

    def end_to_end(self, heads: AttentionInputs) -> Tensor:
        """Causal attention over rows laid end to end, (1, H, N, D), (1, G, N, D)² -> (1, N, H, D).

        Raises:
            MemberAxisError: the tokens are not the plan's, or the plan has no row keys.
        """
        plan = self.axis.plan_for(heads.query.shape[0], self.name, heads.query.shape[2])
        masked = any(self._of_members(plan))

        def attend(group: AttentionRows, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            drops = Drops()
            if masked:
                if group.keys is None:
                    raise MemberAxisError(f"{self.name} drops keys: the plan needs the identities of its examples")
                drops = self._drops(plan, group.keys, (query.shape[1], key.shape[1]))
            return _attend(replace(heads, query=query, key=key, value=value), drops, plain=False)

        return attend_by_rows(plan.end_to_end, heads.query, heads.key, heads.value, attend)  # type: ignore[arg-type]

    def _of_members(self, plan: MemberPlan) -> list[tuple[KeyedSite, ...]]:
        return [self.sites.get(m.adapter, ()) if m.draw is not None else () for m in plan.members]  # type: ignore[arg-type]

    def _drops(self, plan: MemberPlan, keys: RowKeys, heads: tuple[int, int]) -> Drops:
        """Masks of the rows that `keys` are of, member-major."""
        sites, drops = self._of_members(plan), Drops()
        for kind in ("logits", "weights"):
            chosen = [tuple(s for s in of_member if _kind(s[0]) == kind) for of_member in sites]
            if any(chosen):
                setattr(drops, kind, _dropped(keys, chosen, heads))
        return drops


def _kind(site: Site) -> str:
    return "weights" if site.position == "attention_weights" and site.stop_gradient else "logits"


def _dropped(keys: RowKeys, sites: Sequence[tuple[KeyedSite, ...]], heads: tuple[int, int]) -> Tensor:
    """One mask over all rows from the sites of each member; (query heads, key-value heads) are given."""
    parts: list[Tensor] = []
    start = 0
    for of_member, members in groupby(sites):
        stop = start + len(list(members))
        rows = keys.rows_of(start, stop)
        start = stop
        if rows.start == rows.stop:
            continue  # members without a row of this length
        part = torch.zeros(rows.stop - rows.start, 1, 1, 1, dtype=torch.bool, device=keys.position.device)
        for site, key in of_member:
            mask = _mask(keys, rows, key, site, heads)
            width = max(part.shape[1], mask.shape[1])  # per key-value head, repeated where the other is per query head
            part = _to_heads(part, width) | _to_heads(mask, width)
        parts.append(part)
    wide = [max(part.shape[dim] for part in parts) for dim in (1, 2)]
    tokens = keys.position.shape[1]
    return torch.cat([_to_heads(part, wide[0]).expand(-1, wide[0], wide[1], tokens) for part in parts])


def _mask(keys: RowKeys, rows: slice, key: int, site: Site, heads: tuple[int, int]) -> Tensor:
    count = heads[0] if site.heads == "query" else heads[1]
    if site.pattern == "column":
        return dropped_keys(keys, rows, key, count, site).unsqueeze(2)
    return _to_heads(dropped_pairs(keys, rows, key, count, site), heads[0])


def _to_heads(mask: Tensor, heads: int) -> Tensor:
    return mask if mask.shape[1] in (1, heads) else mask.repeat_interleave(heads // mask.shape[1], dim=1)


def member_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: (B, H, T, D), (B, G, T, D)² -> (B, T, H, D) and no weights."""
    installed: AttentionSites | None = getattr(module, _ATTRIBUTE, None)
    plan = None if installed is None else installed.axis.current
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if installed is not None and plan is not None and plan.end_to_end is not None:
        _refuse_unknown_terms(installed, kwargs)
        return installed.end_to_end(AttentionInputs(query, key, value, None, scale, True, dropout)), None
    drops = None if installed is None else installed.drops(query, key)
    plain = installed is not None and installed.plain
    known = all(kwargs.get(term) is None for term in (*UNKNOWN_TERMS, "cache"))
    if drops is None and not plain and not (known and dropout == 0.0 and is_short(query, key)):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    _refuse_unknown_terms(installed, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    heads = AttentionInputs(
        query, key, value, attention_mask, scale, bool(causal) and query.shape[2] > 1 and attention_mask is None,
        dropout,
    )
    return _attend(heads, drops or Drops(), plain).transpose(1, 2).contiguous(), None


def _refuse_unknown_terms(installed: AttentionSites | None, kwargs: Mapping[str, Any]) -> None:
    for term, what in UNKNOWN_TERMS.items():
        if kwargs.get(term) is not None:
            name = None if installed is None else installed.name
            remedy = "Use sites on the LoRA matrices."
            raise ConfigError("adapter.method", name, f"cannot be masked here: its attention has {what}", remedy)


def _attend(heads: AttentionInputs, drops: Drops, plain: bool) -> Tensor:
    """The cheapest form that can express what is dropped."""
    if plain or drops.weights is not None:
        count = heads.query.shape[1]
        logits, weights = (None if d is None else _to_heads(d, count) for d in (drops.logits, drops.weights))
        return plain_attention(heads, logits, weights)
    if drops.logits is None:
        return scaled_dot_product(heads)
    if drops.logits.shape[2] == 1:
        return column_attention(heads, drops.logits.squeeze(2))
    return pair_attention(heads, drops.logits)
