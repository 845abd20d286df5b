"""One decode of several members: all read the same tokens, and the mean of what they expect next is one distribution.

    decoder = Decoder(adapters, members, key, pad_id)
    state = decoder.prefill(prompts)                  # state.log_probs: (B, V), of the token behind each prompt
    while wanted:
        tokens = choose(state.log_probs)              # (B,): one token per row, the same for every member
        state.step(tokens)                            # state.log_probs: of the token behind these
        state.select(rows)                            # as needed: rows that are finished leave, others branch

A pass has members × rows, member-major, as everywhere (`adapters.members`). Weight masks of a member are drawn once, by
its draw, and are the same for every row and every token. Each member keeps its own keys and values of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from pipeline.adapters.attach import Adapters, with_row_keys
from pipeline.adapters.members import MaskKey, Member, MemberPlan, replicate_rows
from pipeline.data.collate import collate, example_keys
from pipeline.data.encode import Encoded
from pipeline.model.head import HEAD_ROWS, evaluating, head_of, hidden_states, states_at
from pipeline.prediction.passes import masks_tokens

TokenSpace = Literal["probability", "logit"]
"""In which the members' distributions of the next token are averaged: see `pipeline.scores.ensemble.average`."""


@dataclass(frozen=True)
class Decoder:
    """Who decodes, and how."""

    adapters: Adapters
    members: Sequence[Member]
    """M ≥ 1."""
    key: MaskKey
    """Of all mask draws."""
    pad_id: int
    """Written in front of shorter prompts."""
    space: TokenSpace = "probability"
    weights: Sequence[float] | None = None
    """Of the members, together 1; None: all alike."""

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Encoded]) -> Decoding:
        """Read B prompts under every member; their labels are not asked, their names key masks made token by token."""
        batch = collate(prompts, self.pad_id)
        device = self.adapters.device
        by_token = any(masks_tokens(self.adapters, member) for member in self.members)
        state = Decoding(
            decoder=self,
            masks=self.adapters.plan(self.members, 1, self.key),
            ids=batch.input_ids.to(device),
            mask=batch.attention_mask.to(device),
            positions=batch.position_ids.to(device),
            examples=example_keys(batch.example_ids).to(device),
            cache=None if by_token else DynamicCache(config=self.adapters.model.config),
        )
        state.read(state.ids.shape[1])
        return state


@dataclass
class Decoding:
    """B rows on their way. Where masks depend on the token, whole sequences are read again at every step."""

    decoder: Decoder
    masks: MemberPlan
    """The members' plan for one row each."""
    ids: Tensor
    """(B, T) tokens so far, prompts padded on the left."""
    mask: Tensor
    """(B, T); 0 on padding."""
    positions: Tensor
    """(B, T), counted from each row's first real token."""
    examples: Tensor
    """(B,) names of the rows, as masks are keyed by them."""
    cache: Cache | None
    """Keys and values of M·B rows; None where whole sequences are read."""
    log_probs: Tensor = torch.empty(0)
    """(B, V) of the next token, averaged over members, normalised; float32, or wider where the model is."""

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Add a token (B,) to every row: the new `log_probs`."""
        new = tokens.to(self.ids)[:, None]
        self.ids = torch.cat([self.ids, new], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=1)
        self.positions = torch.cat([self.positions, self.positions[:, -1:] + 1], dim=1)
        self.read(1)
        return self.log_probs

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Go on with these rows (any number, any order, repeated where a row branches)."""
        chosen = torch.as_tensor(rows, dtype=torch.int64, device=self.ids.device)
        if self.cache is not None:
            members = torch.arange(self.masks.size, device=chosen.device)[:, None] * len(self.ids)
            self.cache.reorder_cache((members + chosen).flatten())
        self.ids, self.mask, self.positions = self.ids[chosen], self.mask[chosen], self.positions[chosen]
        self.examples, self.log_probs = self.examples[chosen], self.log_probs[chosen]

    def read(self, new: int) -> None:
        """Run the members over the last `new` tokens; over all, where nothing is kept."""
        model, rows, size = self.decoder.adapters.model, len(self.ids), self.masks.size
        plan, first = replace(self.masks, rows=rows), self.ids.shape[1] - new if self.cache is not None else 0
        ids, mask, positions = (
            replicate_rows(one, size) for one in (self.ids[:, first:], self.mask, self.positions[:, first:])
        )
        if self.cache is None:
            plan = with_row_keys(plan, self.examples.repeat(size), positions)
        with evaluating(model), self.decoder.adapters.axis.active(plan):
            if self.cache is None:
                states = hidden_states(model, ids, mask, positions)[:, -1]
            else:
                last = torch.full((len(ids), 1), ids.shape[1] - 1, device=ids.device)
                states = states_at(model, ids, mask, positions, last, self.cache)[:, 0]
        states = states.view(size, rows, -1)
        self.log_probs = averaged(head_of(model), states, self.decoder.space, self.decoder.weights)


def averaged(
    head: Callable[[Tensor], Tensor], states: Tensor, space: TokenSpace, weights: Sequence[float] | None = None
) -> Tensor:
    """The members' average distribution of the next token: (M, B, D) last states -> (B, V) log-probabilities.

    `probability`: log Σ_m w_m p_m. `logit`: Σ_m w_m log p_m, normalised again.

    Args:
        weights: w, together 1; None: 1/M each.
    """
    members, rows = states.shape[:2]
    shares = torch.tensor(weights or [1.0 / members] * members, dtype=torch.float64, device=states.device)
    total: Tensor | None = None
    at_once = max(1, HEAD_ROWS // rows)  # members whose (rows, vocabulary) tables are held together
    for begin in range(0, members, at_once):
        logits = head(states[begin : begin + at_once].flatten(0, 1))
        logs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        logs, own = logs.view(-1, rows, logs.shape[-1]), shares[begin : begin + at_once, None, None]
        if space == "probability":
            part = torch.logsumexp(logs + own.log().to(logs.dtype), dim=0)
            total = part if total is None else torch.logaddexp(total, part)
        else:
            part = (logs * own.to(logs.dtype)).sum(0)
            total = part if total is None else total + part
    assert total is not None, "there is a member at least"
    return total if space == "probability" else torch.log_softmax(total, dim=-1)
