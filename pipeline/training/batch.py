"""Examples -> the rows of one pass on the device, along the member axis, with the masks that they are under."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.adapters.attach import Adapters, with_row_keys
from pipeline.adapters.end_to_end import lay_end_to_end
from pipeline.adapters.layout import Pairing, RowLayout, plain_layout, reference_of
from pipeline.adapters.members import MaskKey, MemberPlan, as_index
from pipeline.adapters.sites.anatomy import padding_reason
from pipeline.data.collate import batch_keys, collate, example_keys, lay_in_line
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.loss.consistency import Pairs, Reference
from pipeline.loss.terms import Kind, RowRuns
from pipeline.model.head import hidden_states

TRIED = ((5, 6, 7, 8, 9), (7, 5, 9, 6))
"""Token ids of the rows that a model is tried on."""
APART = 0.25
"""From here on states are those of other rows. In bfloat16 rounding alone can turn a single token's state around (a
relative distance of 1.0 was seen); over the tokens of a row the median was 0.05, and 1.0 where rows see each other."""


@dataclass(frozen=True)
class MemberBatch:
    """The rows of one pass on the device, and the plan they follow.

    R rows: M·B padded ones, or as many as there are examples, fillers left out, laid end to end in one row of N tokens.
    """

    tensors: dict[str, Tensor]
    """input_ids, attention_mask, position_ids, labels (R, T); pairs: token_type_ids; regression: scores (R,). Of rows
    laid end to end (1, N), with the row of each token in token_rows."""
    runs: RowRuns
    """Whose rows they are, and the weight of each in the loss."""
    plan: MemberPlan
    members: Tensor
    """(R,) member of each row."""
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
        """(R,) weight of each row in the loss."""
        return self.runs.weights

    @property
    def counted(self) -> Tensor:
        """(R,) above 0 for rows that are no fillers; a mask-free branch counts, though it has no supervised loss."""
        counted = self.weights
        for one in self.pairs:
            counted = torch.where(one.branch >= 0, one.weights, counted)
        return counted

    def of_run(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """`tensors` of the rows of the run `number` alone, and `counted` as these number their rows."""
        mine = self.runs.run == number
        if "token_rows" not in self.tensors:
            return {name: tensor[mine] for name, tensor in self.tensors.items()}, self.counted[mine]
        own = mine[self.tensors["token_rows"][0]]
        return {name: tensor[:, own] for name, tensor in self.tensors.items()}, self.counted

    @property
    def model_tensors(self) -> dict[str, Tensor]:
        """`tensors`, of packed rows without the attention mask.

        Without one, transformers keeps tokens apart wherever their positions do not follow each other: the examples of
        a row from each other, and padding, whose positions are all 0, from everything. Of rows laid end to end the
        attention follows from the plan: transformers hands a mask of four dimensions on as it is, and makes none of
        N × N.
        """
        if self.plan.end_to_end is not None:
            made = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.weights.device)
            return {**self.tensors, "attention_mask": made}
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
    """Lay examples out as `layout` says and draw the masks of `key`; end to end where the adapters are set to that.

    Args:
        key: of all members, or by adapter.
        smoothing: ε of label smoothing by adapter; none where it is not named.
    """
    device = adapters.device
    own, rows = list(range(len(layout.source))), [examples[index] for index in layout.source]
    if adapters.end_to_end:
        own = [row for row in layout.real for _ in rows[row].parts]
        rows = [part for row in layout.real for part in rows[row].parts]
    member = [row // layout.rows for row in own]
    members = as_index(member, device)
    keys = key if isinstance(key, MaskKey) else [key[m.adapter] for m in layout.members]  # type: ignore[index]
    plan = adapters.plan(layout.members, layout.rows, keys)
    lay_rows = partial(_in_line, member) if adapters.end_to_end else partial(_padded, pad_id, side)
    tensors, plan = lay_rows(adapters, plan, rows)

    order = {adapter: number for number, adapter in enumerate(layout.adapters)}
    run = as_index([order[layout.members[m].adapter] for m in member], device)
    weights = torch.tensor([layout.weights[row] for row in own], dtype=torch.float32, device=device)
    runs = RowRuns(run, weights, tuple((smoothing or {}).get(adapter, 0.0) for adapter in order))  # type: ignore[arg-type]
    reference, others = None, reference_of(layout)
    members_of_others: Tensor | None = None
    if others is not None:
        other = lay_out(adapters, examples, others, pad_id, key, side)
        reference, members_of_others = Reference(other.model_tensors, other.plan), other.members
    pairs = _pairs(layout, own, members, others, members_of_others)
    names = tuple(row.example for row in rows)
    packed = not adapters.end_to_end and any(len(row.parts) > 1 for row in rows)
    return MemberBatch(tensors, runs, plan, members, names, pairs, reference, packed)


def _pairs(
    layout: RowLayout, own: Sequence[int], members: Tensor, others: RowLayout | None, members_of_others: Tensor | None
) -> tuple[Pairs, ...]:
    """The pairings of a layout, those of one form together.

    Args:
        own: the rows of the layout that there are.
        members: (R,) of each of them.
        others, members_of_others: the same of the branches without gradient.
    """
    forms: dict[tuple[Kind, int, int], list[Pairing]] = {}
    for one in layout.pairings:
        forms.setdefault((one.kind, one.branches, one.reference_branches), []).append(one)
    found = []
    for (kind, branches, fixed_branches), alike in forms.items():
        weights = [0.0] * len(layout.source)
        for one in alike:
            start = one.first * layout.rows
            weights[start : start + len(one.weights)] = one.weights
        of_rows = torch.tensor([weights[row] for row in own], device=members.device)
        runs, fixed = {layout.members[one.first].adapter for one in alike}, None
        if fixed_branches and others is not None and members_of_others is not None:
            fixed = _branch_of_rows(others, members_of_others, runs, fixed_branches)
        branch = _branch_of_rows(layout, members, runs, branches)
        found.append(Pairs(kind, branch, of_rows, branches, fixed, fixed_branches))
    return tuple(found)


def _branch_of_rows(layout: RowLayout, members: Tensor, runs: Collection[int | None], branches: int) -> Tensor:
    """(R,) 0 … branches - 1 over the members of some runs, which each have a multiple of that; else -1.

    `members`: (R,) of each row.
    """
    mine = torch.tensor([one.adapter in runs for one in layout.members], device=members.device)
    return torch.where(mine, (mine.cumsum(0) - 1) % branches, -1)[members]


def choose_rows(adapters: Adapters, attention: str, longest: int) -> str | None:
    """Have `lay_out` lay rows end to end where the model says of a few tokens what it says of padded rows.

    Returns:
        Why rows are padded; None where they lie end to end.

    Args:
        attention, longest: as `padding_reason`.
    """
    def states() -> Tensor:
        rows = [Encoded(str(ids), ids, (IGNORE_INDEX,) * len(ids)) for ids in TRIED]
        built = lay_out(adapters, rows, plain_layout(len(rows)), 0, MaskKey(0, "rows"))
        read = built.model_tensors
        with torch.no_grad(), adapters.axis.active(built.plan):
            hidden = hidden_states(adapters.model, read["input_ids"], read["attention_mask"], read["position_ids"])
        return hidden[built.tensors["attention_mask"].bool()].float()

    if reason := padding_reason(adapters.model, attention, longest):
        return reason
    padded = states()
    adapters.set_end_to_end(attention, longest)
    try:
        apart = (states() - padded).norm(dim=1) / padded.norm(dim=1)
        if all(float(row.median()) < APART for row in apart.split([len(ids) for ids in TRIED])):
            return None
    except (RuntimeError, TypeError, ValueError):  # a family that does something of its own with masks or positions
        pass
    adapters.end_to_end = False
    return f"{type(adapters.model).__name__} does not keep rows that lie end to end apart"


def _padded(
    pad_id: int, side: Literal["left", "right"], adapters: Adapters, plan: MemberPlan, rows: Sequence[Encoded]
) -> tuple[dict[str, Tensor], MemberPlan]:
    batch = collate(rows, pad_id, side=side)
    tensors = batch.tensors(adapters.device)
    if adapters.needs_row_keys():
        plan = with_row_keys(plan, batch_keys(batch).to(adapters.device), tensors["position_ids"])
    return tensors, plan


def _in_line(
    member: Sequence[int], adapters: Adapters, plan: MemberPlan, rows: Sequence[Encoded]
) -> tuple[dict[str, Tensor], MemberPlan]:
    """`member`: of each row."""
    device = adapters.device
    lengths: list[list[int]] = [[] for _ in plan.members]
    for m, row in zip(member, rows, strict=True):
        lengths[m].append(len(row.input_ids))
    keys = example_keys([row.example for row in rows]).to(device) if adapters.needs_row_keys() else None
    return lay_in_line(rows).tensors(device), lay_end_to_end(plan, lengths, device, keys)
