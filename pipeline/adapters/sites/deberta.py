"""DeBERTa-v2 and -v3: the relative positions that query_proj and key_proj project belong to no row.

Its attention adds to the logits of (query i, key j) products with projected embeddings of the distance i - j:
q_i · (W_k r_δ) and k_j · (W_q r_-δ), where W_q and W_k are (with `share_att_key`, as in v3) the matrices of queries and
keys. An adapted W is another matrix for every member, so the table r is projected once for each member, under its
weight masks, and every member's rows use their own. The arithmetic of the bias itself stays transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.linear import LoRALinear
from pipeline.adapters.members import MemberAxis, MemberPlan, RowKeys
from pipeline.randomness import key64

BIAS = "disentangled_attention_bias"
"""The method of transformers' DisentangledSelfAttention that projects the table."""
POSITION_PROJECTIONS = ("query_proj", "key_proj", "pos_query_proj", "pos_key_proj")
"""Linears that project it: the first two with `share_att_key`, else the last two."""
TABLE_KEY = key64("relative positions") >> 1
"""Stands in for an example in the masks of `lora_input`: all rows of a member share the table's mask, as in PEFT."""


def install_position_projections(model: nn.Module, axis: MemberAxis) -> None:
    """Let every attention of a DeBERTa-v2 whose position projections are adapted project the table per member.

    Call it after the linears have been wrapped; other models are left alone.
    """
    for module in model.modules():
        if hasattr(module, BIAS) and projections(module):
            setattr(module, BIAS, MemberPositions(module, getattr(module, BIAS), axis))


def projections(module: nn.Module) -> list[str]:
    """Names of the adapted linears that project the table."""
    used = POSITION_PROJECTIONS[:2] if getattr(module, "share_att_key", False) else POSITION_PROJECTIONS[2:]
    return [name for name in used if isinstance(getattr(module, name, None), LoRALinear)]


@dataclass
class MemberPositions:
    """Takes the place of `disentangled_attention_bias` in one attention module."""

    module: nn.Module
    stock: Any
    """The bound method of transformers."""
    axis: MemberAxis

    def __call__(
        self, query: Tensor, key: Tensor, relative_pos: Tensor | None, rel_embeddings: Tensor, scale_factor: int
    ) -> Tensor:
        """(M·B·H, T, D) queries and keys, a (2·span, hidden) table -> (M·B·H, T, T) terms of the logits."""
        plan = self.axis.current
        if plan is None:
            return self.stock(query, key, relative_pos, rel_embeddings, scale_factor)
        projected = self._project(plan, rel_embeddings)
        rows = len(query) // plan.size
        parts = []
        for m, (queries, keys) in enumerate(zip(query.split(rows), key.split(rows), strict=True)):
            stand_in: Any = _WithTable(self.module, {name: table[m : m + 1] for name, table in projected.items()})
            parts.append(
                type(self.module).disentangled_attention_bias(  # type: ignore[operator]
                    stand_in, queries, keys, relative_pos, rel_embeddings, scale_factor
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _project(self, plan: MemberPlan, rel_embeddings: Tensor) -> dict[str, Tensor]:
        """(M, 2·span, heads · D) by projection: each member's copy of the table as its one row."""
        span: int = self.module.pos_ebd_size  # type: ignore[assignment]
        table = rel_embeddings[: 2 * span].unsqueeze(0).expand(plan.size, -1, -1)
        of_table = replace(plan, rows=1, row_keys=_table_keys(plan, table.shape[1]))
        with self.axis.active(of_table):
            return {name: getattr(self.module, name)(table) for name in projections(self.module)}


class _WithTable:
    """The attention module, its position projections answering with what has been computed for one member."""

    def __init__(self, module: nn.Module, projected: dict[str, Tensor]) -> None:
        self._module, self._projected = module, projected

    def __getattr__(self, name: str) -> Any:
        if name in self._projected:
            return lambda table: self._projected[name]
        return getattr(self._module, name)


def _table_keys(plan: MemberPlan, entries: int) -> RowKeys | None:
    """Keys of the table's rows, one per member, where the plan has any."""
    keys = plan.row_keys
    if keys is None:
        return None
    position = torch.arange(entries, device=keys.position.device).expand(plan.size, -1)
    example = torch.full((plan.size,), TABLE_KEY, dtype=torch.int64, device=keys.position.device)
    return RowKeys(keys.seeds, keys.branch[:: plan.rows], example, position)
