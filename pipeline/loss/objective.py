"""The models of each kind as modules that say the loss of every supervised place of a pass."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pipeline.adapters.sites.anatomy import is_causal
from pipeline.loss.consistency import Features
from pipeline.loss.terms import (
    Smoothing,
    class_losses,
    nll_and_log_probs,
    representation_log_probs,
    supervised_positions,
    token_losses,
)
from pipeline.model.classifier import head_outputs, head_outputs_and_hidden
from pipeline.model.head import head_of, hidden_states


class Supervised(nn.Module, ABC):
    """A model and the loss of its kind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def losses(self, *, smoothing: Smoothing = 0.0, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """((n,) loss of every supervised place, float32, in nats; (n,) its row)."""

    @abstractmethod
    def features(self, **tensors: Tensor) -> Features:
        """One forward pass, up to the supervised places."""

    @abstractmethod
    def score(self, features: Tensor, targets: Tensor, smoothing: Smoothing = 0.0) -> tuple[Tensor, Tensor]:
        """((n, D), (n,)) -> ((n,) losses, (n, V) log-probabilities that branches are compared by)."""

    def forward(self, row_weights: Tensor, smoothing: Smoothing = 0.0, **tensors: Tensor) -> Tensor:
        """Σ weight(row) · loss over supervised places, of one run; row_weights (M·B,)."""
        losses, rows = self.losses(smoothing=smoothing, **tensors)
        return (losses * row_weights[rows]).sum()


class SupervisedLM(Supervised):
    """A causal model: logits only where tokens are supervised. Tensors are (M·B, T).

    Packed rows come without attention mask: see `MemberBatch.model_tensors`. Rows laid end to end are (1, N), and
    `token_rows` says which row a token is of.
    """

    def losses(  # type: ignore[override]
        self, *, input_ids: Tensor, position_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None,
        token_rows: Tensor | None = None, smoothing: Smoothing = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """-log p of every supervised token."""
        hidden = hidden_states(self.model, input_ids, attention_mask, position_ids)
        losses, rows = token_losses(hidden, labels, head_of(self.model), smoothing, token_rows)
        return losses.float(), rows

    def features(  # type: ignore[override]
        self, *, input_ids: Tensor, position_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None,
        token_rows: Tensor | None = None,
    ) -> Features:
        """Hidden states (n, D) that predict the supervised tokens."""
        hidden = hidden_states(self.model, input_ids, attention_mask, position_ids)
        rows, positions, targets = supervised_positions(labels)
        own = rows if token_rows is None else token_rows[rows, positions]
        return Features(hidden[rows, positions], own, targets)

    def score(self, features: Tensor, targets: Tensor, smoothing: Smoothing = 0.0) -> tuple[Tensor, Tensor]:
        """nll of each token, and the distribution over the vocabulary."""
        return nll_and_log_probs(head_of(self.model)(features), targets, smoothing)


class SupervisedClassifier(Supervised):
    """A model with a classification head. Tensors are (M·B, T); `labels` holds one class per row, anywhere in it.

    Position ids are the model's own affair: RoBERTa's do not start at 0.
    """

    def losses(  # type: ignore[override]
        self, *, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor,
        token_type_ids: Tensor | None = None, smoothing: Smoothing = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """-log softmax(logits)[class] of every row."""
        logits = head_outputs(self.model, input_ids, attention_mask, token_type_ids)
        return class_losses(logits, labels.amax(dim=1), smoothing), _every_row(logits)

    def features(  # type: ignore[override]
        self, *, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Features:
        """Logits (M·B, C) of every row."""
        logits = head_outputs(self.model, input_ids, attention_mask, token_type_ids)
        return Features(logits, _every_row(logits), labels.amax(dim=1))

    def score(self, features: Tensor, targets: Tensor, smoothing: Smoothing = 0.0) -> tuple[Tensor, Tensor]:
        """nll of each row's class, and the distribution over the classes."""
        return nll_and_log_probs(features, targets, smoothing)


class SupervisedRegressor(Supervised):
    """A model whose head has one output. Tensors are (M·B, T), but `scores` (M·B,). Nothing is smoothed."""

    def losses(  # type: ignore[override]
        self, *, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor, scores: Tensor,
        token_type_ids: Tensor | None = None, smoothing: Smoothing = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """(output - score)² of every row."""
        values = head_outputs(self.model, input_ids, attention_mask, token_type_ids)[:, 0]
        return (values.float() - scores).square(), _every_row(values)

    def features(  # type: ignore[override]
        self, *, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor, scores: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Features:
        """(M·B, 1 + D): the output of every row, and its last-layer representation.

        That is the last hidden state of the token that the head reads: an encoder's first, a causal model's last.
        """
        values, hidden = head_outputs_and_hidden(self.model, input_ids, attention_mask, token_type_ids)
        token = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        order = attention_mask * (token if is_causal(self.model) else token.flip(0))
        rows = _every_row(hidden)
        representation = hidden[rows, order.argmax(dim=1)].float()
        return Features(torch.cat([values.float(), representation], dim=1), rows, scores)

    def score(self, features: Tensor, targets: Tensor, smoothing: Smoothing = 0.0) -> tuple[Tensor, Tensor]:
        """Squared error of each row's output, and its representation as a distribution."""
        return (features[:, 0] - targets).square(), representation_log_probs(features[:, 1:])


def _every_row(outputs: Tensor) -> Tensor:
    return torch.arange(len(outputs), device=outputs.device)
