"""The models of each kind as modules whose forward is the weighted loss of a pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.adapters.sites.anatomy import is_causal
from pipeline.loss.consistency import Features
from pipeline.loss.terms import (
    nll_and_log_probs,
    representation_log_probs,
    supervised_positions,
    weighted_class_nll,
    weighted_nll,
    weighted_squared_error,
)
from pipeline.model.classifier import head_outputs, head_outputs_and_hidden
from pipeline.model.head import head_of, hidden_states


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

        Packed rows come without attention mask: see `MemberBatch.model_tensors`.
        """
        hidden = hidden_states(self.model, input_ids, attention_mask, position_ids)
        return weighted_nll(hidden, labels, head_of(self.model), row_weights, self.smoothing)[0]

    def features(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> Features:
        """Hidden states (n, D) that predict the supervised tokens."""
        hidden = hidden_states(self.model, input_ids, attention_mask, position_ids)
        rows, positions, targets = supervised_positions(labels)
        return Features(hidden[rows, positions], rows, targets)

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

    def features(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Features:
        """Logits (M·B, C) of every row."""
        logits = head_outputs(self.model, input_ids, attention_mask, token_type_ids)
        return Features(logits, torch.arange(len(logits), device=logits.device), labels.amax(dim=1))

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

    def features(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor, scores: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Features:
        """(M·B, 1 + D): the output of every row, and its last-layer representation.

        That is the last hidden state of the token that the head reads: an encoder's first, a causal model's last.
        """
        values, hidden = head_outputs_and_hidden(self.model, input_ids, attention_mask, token_type_ids)
        token = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        order = attention_mask * (token if is_causal(self.model) else token.flip(0))
        rows = torch.arange(len(hidden), device=hidden.device)
        representation = hidden[rows, order.argmax(dim=1)].float()
        return Features(torch.cat([values.float(), representation], dim=1), rows, scores)

    def score(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of each row's output, and its representation as a distribution."""
        return (features[:, 0] - targets).square(), representation_log_probs(features[:, 1:])
