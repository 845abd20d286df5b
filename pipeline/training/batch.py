"""Examples -> the rows of one pass on the device, along the member axis, with the masks that they are under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.adapters.attach import Adapters, with_row_keys
from pipeline.adapters.layout import Pairing, RowLayout, reference_of
from pipeline.adapters.members import MaskKey, MemberPlan, as_index
from pipeline.data.collate import batch_keys, collate
from pipeline.data.encode import Encoded
from pipeline.loss.consistency import Pairs, Reference
from pipeline.loss.terms import Kind, RowRuns


@dataclass(frozen=True)
class MemberBatch:
    """The rows of one pass on the device, and the plan they follow."""

    tensors: dict[str, Tensor]
    """input_ids, attention_mask, position_ids, labels (M·B, T); pairs: token_type_ids; regression: scores (M·B,)."""
    runs: RowRuns
    """Whose rows they are, and the weight of each in the loss."""
    plan: MemberPlan
    examples: tuple[str, ...] = ()
    """(M·B) example ids."""
    pairs: tuple[Pairs, ...] = ()
    """Which rows are branches of one example, where the method of a run has a consistency term."""
    reference: Reference | None = None
    """Its branches without gradient."""
    packed: bool = False
    """Whether some row holds several examples."""

    @property
    def weights(self) -> Tensor:
        """(M·B,) weight of each row in the loss."""
        return self.runs.weights

    @property
    def counted(self) -> Tensor:
        """(M·B,) above 0 for rows that are no fillers; a mask-free branch counts, though it has no supervised loss."""
        counted = self.weights
        for one in self.pairs:
            counted = torch.where(one.branch >= 0, one.weights, counted)
        return counted

    def of_run(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """`tensors` and `counted` of the rows of the run `number` alone."""
        adapters = [member.adapter for member in self.plan.members]
        own = list(dict.fromkeys(adapters))[number]
        start = adapters.index(own) * self.plan.rows
        rows = slice(start, start + adapters.count(own) * self.plan.rows)
        return {name: tensor[rows] for name, tensor in self.tensors.items()}, self.counted[rows]

    @property
    def model_tensors(self) -> dict[str, Tensor]:
        """`tensors`, of packed rows without the attention mask.

        Without one, transformers keeps tokens apart wherever their positions do not follow each other: the examples of
        a row from each other, and padding, whose positions are all 0, from everything.
        """
        return {name: tensor for name, tensor in self.tensors.items() if not (self.packed and name == "attention_mask")}

    @property
    def inputs(self) -> dict[str, Any]:
        """What the training objective is called with."""
        paired = {"pairs": self.pairs, "reference": self.reference} if self.pairs else {}
        return {**self.model_tensors, "runs": self.runs, **paired}


def lay_out(
    adapters: Adapters, examples: list[Encoded], layout: RowLayout, pad_id: int, key: MaskKey | Mapping[int, MaskKey],
    side: Literal["left", "right"] = "left", smoothing: Mapping[int, float] | None = None,
) -> MemberBatch:
    """Lay examples out as `layout` says and draw the masks of `key`.

    Args:
        key: of all members, or by adapter.
        smoothing: ε of label smoothing by adapter; none where it is not named.
    """
    device = adapters.device
    batch = collate([examples[index] for index in layout.source], pad_id, side=side)
    tensors = batch.tensors(device)
    keys = key if isinstance(key, MaskKey) else [key[m.adapter] for m in layout.members]  # type: ignore[index]
    plan = adapters.plan(layout.members, layout.rows, keys)
    if adapters.needs_row_keys():
        plan = with_row_keys(plan, batch_keys(batch).to(device), tensors["position_ids"])
    order = {adapter: number for number, adapter in enumerate(layout.adapters)}
    run = as_index([order[member.adapter] for member in layout.members], device).repeat_interleave(layout.rows)
    weights = torch.tensor(layout.weights, dtype=torch.float32, device=device)
    runs = RowRuns(run, weights, tuple((smoothing or {}).get(adapter, 0.0) for adapter in order))  # type: ignore[arg-type]
    reference, rows_of_reference = None, reference_of(layout)
    if rows_of_reference is not None:
        other = lay_out(adapters, examples, rows_of_reference, pad_id, key, side)
        reference = Reference(other.model_tensors, other.plan)
    pairs = _pairs(layout, rows_of_reference, device)
    return MemberBatch(tensors, runs, plan, tuple(batch.example_ids), pairs, reference, batch.packed)


def _pairs(layout: RowLayout, reference: RowLayout | None, device: torch.device) -> tuple[Pairs, ...]:
    """The pairings of a layout, those of one form together."""
    forms: dict[tuple[Kind, int, int], list[Pairing]] = {}
    for one in layout.pairings:
        forms.setdefault((one.kind, one.branches, one.reference_branches), []).append(one)
    found = []
    for (kind, branches, fixed_branches), alike in forms.items():
        weights = torch.zeros(len(layout.source))
        for one in alike:
            start = one.first * layout.rows
            weights[start : start + len(one.weights)] = torch.tensor(one.weights)
        own = {layout.members[one.first].adapter for one in alike}
        branch = _branch_of_rows(layout, own, branches)
        fixed = None if reference is None else _branch_of_rows(reference, own, fixed_branches).to(device)
        moved = branch.to(device), weights.to(device)
        found.append(Pairs(kind, *moved, branches, fixed if fixed_branches else None, fixed_branches))
    return tuple(found)


def _branch_of_rows(layout: RowLayout, own: set[int | None], branches: int) -> Tensor:
    """(M·B,) 0 … branches - 1 over the members of the runs in `own`, which each have a multiple of that; else -1."""
    mine = torch.tensor([member.adapter in own for member in layout.members])
    of_member = torch.where(mine, (mine.cumsum(0) - 1) % max(branches, 1), -1)
    return of_member.repeat_interleave(layout.rows)
