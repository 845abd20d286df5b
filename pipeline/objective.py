"""Assembly of one training pass: examples → rows along the member axis → weighted loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.adapters.anatomy import is_causal
from pipeline.adapters.attach import Adapters, with_row_keys
from pipeline.adapters.layout import RowLayout
from pipeline.adapters.members import MemberPlan
from pipeline.consistency import Pairs, Read, Reference
from pipeline.data.batches import Batch, collate
from pipeline.data.encode import Encoded
from pipeline.divergence import representation_log_probs
from pipeline.losses import (
    nll_and_log_probs,
    supervised_positions,
    weighted_class_nll,
    weighted_nll,
    weighted_squared_error,
)
from pipeline.model.classifier import head_outputs, head_outputs_and_hidden
from pipeline.model.head import head_of, hidden_states
from pipeline.randomness import key64


class SupervisedLM(nn.Module):
    """A causal model whose forward is the loss: logits only where tokens are supervised."""

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, row_weights: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Σ weight(row) · nll over supervised tokens, in nats. All arguments (M·B, T) but row_weights (M·B,).

        Packed rows come without attention mask: see `Rows.model_tensors`.
        """
        hidden = hidden_states(self.model, input_ids, attention_mask, position_ids)
        return weighted_nll(hidden, labels, head_of(self.model), row_weights, self.smoothing)[0]

    def read(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> Read:
        """Hidden states (n, D) that predict the supervised tokens."""
        hidden = hidden_states(self.model, input_ids, attention_mask, position_ids)
        rows, positions, targets = supervised_positions(labels)
        return Read(hidden[rows, positions], rows, targets)

    def score(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """nll of each token, and the distribution over the vocabulary."""
        return nll_and_log_probs(head_of(self.model)(features), targets, self.smoothing)


class SupervisedClassifier(nn.Module):
    """A model with a classification head whose forward is the loss."""

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor, row_weights: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Σ weight(row) · nll of the row's class, in nats. All arguments (M·B, T) but row_weights (M·B,).

        `labels` holds one class per row, anywhere in it. Position ids are the model's own affair: RoBERTa's do not
        start at 0.
        """
        logits = head_outputs(self.model, input_ids, attention_mask, token_type_ids)
        return weighted_class_nll(logits, labels.amax(dim=1), row_weights, self.smoothing)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Read:
        """Logits (M·B, C) of every row."""
        logits = head_outputs(self.model, input_ids, attention_mask, token_type_ids)
        return Read(logits, torch.arange(len(logits), device=logits.device), labels.amax(dim=1))

    def score(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """nll of each row's class, and the distribution over the classes."""
        return nll_and_log_probs(features, targets, self.smoothing)


class SupervisedRegressor(nn.Module):
    """A model whose head has one output and whose forward is the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor, row_weights: Tensor,
        scores: Tensor, token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Σ weight(row) · (output - score)². All arguments (M·B, T) but row_weights and scores (M·B,)."""
        values = head_outputs(self.model, input_ids, attention_mask, token_type_ids)[:, 0]
        return weighted_squared_error(values, scores, row_weights)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor, scores: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Read:
        """(M·B, 1 + D): the output of every row, and its last-layer representation.

        That is the last hidden state of the token that the head reads: an encoder's first, a causal model's last.
        """
        values, hidden = head_outputs_and_hidden(self.model, input_ids, attention_mask, token_type_ids)
        token = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        order = attention_mask * (token if is_causal(self.model) else token.flip(0))
        rows = torch.arange(len(hidden), device=hidden.device)
        representation = hidden[rows, order.argmax(dim=1)].float()
        return Read(torch.cat([values.float(), representation], dim=1), rows, scores)

    def score(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of each row's output, and its representation as a distribution."""
        return (features[:, 0] - targets).square(), representation_log_probs(features[:, 1:])


@dataclass(frozen=True)
class Rows:
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


def build_rows(
    adapters: Adapters, examples: list[Encoded], layout: RowLayout, pad_id: int, seed: int, phase: object,
    side: Literal["left", "right"] = "left",
) -> Rows:
    """Lay examples out as `layout` says and draw the masks of (seed, phase)."""
    device = adapters.device
    batch = collate([examples[index] for index in layout.source], pad_id, side=side)
    tensors = batch.tensors(device)
    plan = adapters.plan(layout.members, layout.rows, seed, phase)
    if adapters.needs_row_keys():
        keys = batch_keys(batch).to(device)
        plan = with_row_keys(plan, seed, phase, keys, tensors["position_ids"])
    weights = torch.tensor(layout.weights, dtype=torch.float32, device=device)
    pairs = None
    if layout.pairing is not None:
        pairing, reference = layout.pairing, None
        if pairing.reference is not None:
            other = build_rows(adapters, examples, pairing.reference, pad_id, seed, phase, side)
            reference = Reference(other.model_tensors, other.plan, pairing.reference_branches)
        of_term = torch.tensor(pairing.weights, dtype=torch.float32, device=device)
        pairs = Pairs(pairing.branches, of_term, layout.rows, reference)
    return Rows(tensors, weights, plan, tuple(batch.example_ids), pairs, batch.packed)


def batch_keys(batch: Batch) -> Tensor:
    """`example_keys` of a batch; (B, T), one per token, where rows are packed."""
    if not batch.packed:
        return example_keys(batch.example_ids)
    keys = torch.zeros_like(batch.input_ids)
    for row, parts in enumerate(batch.parts):
        for key, (_, place) in zip(example_keys([name for name, _ in parts]), parts, strict=True):
            keys[row, place] = key
    return keys


def example_keys(example_ids: list[str]) -> Tensor:
    """(B,) int64 identities of examples, the same in every layout and process."""
    return torch.tensor([key64("example", name) >> 1 for name in example_ids], dtype=torch.int64)
