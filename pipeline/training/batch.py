"""Examples -> the rows of one pass on the device, along the member axis, with the masks that they are under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.adapters.attach import Adapters, with_row_keys
from pipeline.adapters.layout import RowLayout
from pipeline.adapters.members import MaskKey, MemberPlan
from pipeline.data.collate import batch_keys, collate
from pipeline.data.encode import Encoded
from pipeline.loss.consistency import Pairs, Reference


@dataclass(frozen=True)
class MemberBatch:
    """The rows of one pass on the device, and the plan they follow."""

    tensors: dict[str, Tensor]
    """input_ids, attention_mask, position_ids, labels (M·B, T); pairs: token_type_ids; regression: scores (M·B,)."""
    weights: Tensor
    """(M·B,) weight of each row in the loss."""
    plan: MemberPlan
    examples: tuple[str, ...] = ()
    """(M·B) example ids."""
    pairs: Pairs | None = None
    """Which rows are branches of one example, where the method has a consistency term."""
    packed: bool = False
    """Whether some row holds several examples."""

    @property
    def counted(self) -> Tensor:
        """(M·B,) above 0 for rows that are no fillers; a mask-free branch counts, though it has no supervised loss."""
        return self.weights if self.pairs is None else self.pairs.weights

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
        paired = {} if self.pairs is None else {"pairs": self.pairs}
        return {**self.model_tensors, "row_weights": self.weights, **paired}


def lay_out(
    adapters: Adapters, examples: list[Encoded], layout: RowLayout, pad_id: int, key: MaskKey,
    side: Literal["left", "right"] = "left",
) -> MemberBatch:
    """Lay examples out as `layout` says and draw the masks of `key`."""
    device = adapters.device
    batch = collate([examples[index] for index in layout.source], pad_id, side=side)
    tensors = batch.tensors(device)
    plan = adapters.plan(layout.members, layout.rows, key)
    if adapters.needs_row_keys():
        plan = with_row_keys(plan, batch_keys(batch).to(device), tensors["position_ids"])
    weights = torch.tensor(layout.weights, dtype=torch.float32, device=device)
    pairs = None
    if layout.pairing is not None:
        pairing, reference = layout.pairing, None
        if pairing.reference is not None:
            other = lay_out(adapters, examples, pairing.reference, pad_id, key, side)
            reference = Reference(other.model_tensors, other.plan, pairing.reference_branches)
        of_term = torch.tensor(pairing.weights, dtype=torch.float32, device=device)
        pairs = Pairs(pairing.branches, of_term, layout.rows, reference)
    return MemberBatch(tensors, weights, plan, tuple(batch.example_ids), pairs, batch.packed)
