"""One pass of a causal model over sequences, under M members: log-probabilities at the scored positions only.

Rows are padded on the left, with a mask, as in training; or, where the model was seen to give the same, on the right
without one: what is padding lies behind all that is scored. Then passes also share keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.attach import Adapters, with_row_keys
from pipeline.adapters.members import MemberPlan, replicate_rows
from pipeline.data.collate import Batch, collate, example_keys
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.model.head import at, head_of, hidden_states, log_probs_at, states_at
from pipeline.model.shared_keys import continued, first_pass
from pipeline.prediction.sequences import Scored

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

KEY_COST = 16
"""Looking up the keys and values of so many tokens takes about the memory of computing one."""
PASS_COST = 64
"""What a pass costs beside its tokens, in tokens."""
Answered = list[tuple[Scored, np.ndarray]]
"""Sequences with their (M, targets) log-probabilities."""


def replicated(adapters: Adapters, masks: MemberPlan, batch: Batch) -> tuple[MemberPlan, dict[str, Tensor]]:
    """The plan of a batch that stands in the pass once per member, and its (M·B, T) tensors."""
    tensors = {name: replicate_rows(t, masks.size) for name, t in batch.tensors(adapters.device).items()}
    plan = replace(masks, rows=len(batch.example_ids))
    if adapters.needs_row_keys():
        examples = example_keys(batch.example_ids).to(adapters.device).repeat(masks.size)
        plan = with_row_keys(plan, examples, tensors["position_ids"])
    return plan, tensors


@dataclass(frozen=True)
class PaddedPass:
    """Whole sequences, padded on the left, under a mask: for every model and every kind of site."""

    adapters: Adapters
    masks: MemberPlan
    """The members' plan for one row each."""
    pad_id: int

    def __call__(self, sequences: Sequence[Scored]) -> Answered:
        """Score sequences without tails."""
        batch = collate([_text(one) for one in sequences], self.pad_id)
        plan, tensors = replicated(self.adapters, self.masks, batch)
        places = Places.of(sequences, batch.input_ids.shape[1])
        with self.adapters.axis.active(plan):
            hidden = hidden_states(
                self.adapters.model, tensors["input_ids"], tensors["attention_mask"], tensors["position_ids"]
            )
        states = at(hidden, replicate_rows(places.table.to(hidden.device), self.masks.size))
        return places.answered(self.adapters, states, self.masks.size)


@dataclass(frozen=True)
class SharingPass:
    """Sequences behind a common beginning, which every member has read once; and then their tails."""

    adapters: Adapters
    masks: MemberPlan
    """The members' plan for one row each."""
    pad_id: int
    budget_tokens: int
    """Of a pass over tails, at most: each counts for itself and for what it looks up, see `KEY_COST`."""
    beginning: tuple[int, ...]
    """Of all sequences, which are without it; may be empty."""

    def __call__(self, sequences: Sequence[Scored]) -> Answered:
        """Score sequences, and the tails that continue them."""
        batch = collate([_text(one) for one in sequences], self.pad_id, "right")
        before, tails = len(self.beginning), [(b, tail) for b, one in enumerate(sequences) for tail in one.tails]
        cache = self._behind_beginning(len(sequences), keep=bool(tails))
        positions = torch.arange(before, before + batch.input_ids.shape[1])
        answered = self._run(sequences, batch.input_ids, None, positions.expand_as(batch.input_ids), cache)
        if not tails or cache is None:
            return answered
        read = torch.cat([torch.ones(len(sequences), before, dtype=torch.int64), batch.attention_mask], dim=1)
        tails.sort(key=lambda one: -len(one[1].input_ids))
        while tails:
            row_tokens = len(tails[0][1].input_ids) + read.shape[1] // KEY_COST
            count = max(1, self.budget_tokens // (self.masks.size * row_tokens))
            count = worth_padding([len(tail.input_ids) for _, tail in tails[:count]], self.masks.size)
            answered += self._continue(tails[:count], read, cache)
            tails = tails[count:]
        return answered

    def _continue(self, tails: Sequence[tuple[int, Scored]], read: Tensor, cache: Cache) -> Answered:
        """Score tails, each behind its row of the pass before, of which `read` (B, T) marks the tokens."""
        source = torch.tensor([b for b, _ in tails])
        batch = collate([_text(tail) for _, tail in tails], self.pad_id, "right")
        seen = torch.cat([read[source], torch.ones_like(batch.input_ids)], dim=1)
        positions = read.sum(1)[source, None] + torch.arange(batch.input_ids.shape[1])
        rows = torch.arange(self.masks.size)[:, None] * len(read) + source
        behind = continued(cache, rows.flatten().to(self.adapters.device), keep=False)
        return self._run([tail for _, tail in tails], batch.input_ids, seen, positions, behind)

    def _behind_beginning(self, rows: int, keep: bool) -> Cache | None:
        """What `rows` sequences under every member continue; None where that is nothing and nothing will follow."""
        if not self.beginning:
            return first_pass() if keep else None
        members = torch.arange(self.masks.size, device=self.adapters.device)
        return continued(self._read, members.repeat_interleave(rows), keep)

    @cached_property
    def _read(self) -> Cache:
        """Keys and values of the beginning, a row per member."""
        cache, device = first_pass(), self.adapters.device
        ids = torch.tensor([self.beginning], device=device).expand(self.masks.size, -1)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        with self.adapters.axis.active(replace(self.masks, rows=1)):
            hidden_states(self.adapters.model, ids, None, positions, cache)
        return cache

    def _run(
        self, sequences: Sequence[Scored], ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache | None
    ) -> Answered:
        places = Places.of(sequences)
        ids, positions, table, *masks = (
            replicate_rows(one.to(self.adapters.device), self.masks.size)
            for one in (ids, positions, places.table, *([] if mask is None else [mask]))
        )
        with self.adapters.axis.active(replace(self.masks, rows=len(sequences))):
            states = states_at(self.adapters.model, ids, masks[0] if masks else None, positions, table, cache)
        return places.answered(self.adapters, states, self.masks.size)


def worth_padding(lengths: Sequence[int], members: int) -> int:
    """How many of these sequences, the longest first, go through together: to the others, which are shorter, a pass of
    their own would cost less than padding."""
    rows = len(lengths)
    padding = {count: members * (rows - count) * (lengths[0] - lengths[count]) for count in range(1, rows)}
    most = max(padding, key=padding.__getitem__, default=rows)
    return most if padding.get(most, 0) > PASS_COST else rows


@dataclass(frozen=True)
class Places:
    """Where the sequences of a batch are scored."""

    sequences: Sequence[Scored]
    table: Tensor
    """(B, S) positions in the padded rows; rows with fewer repeat their last."""
    distinct: list[tuple[int, int]]
    """P (row, column) of `table`, each position once."""
    source: list[int]
    """For every target, sequence by sequence: its index in `distinct`; rising."""

    @classmethod
    def of(cls, sequences: Sequence[Scored], length: int | None = None) -> Places:
        """Of rows padded on the right; on the left, to `length` tokens, where that is given."""
        rows: list[list[int]] = []
        distinct: list[tuple[int, int]] = []
        source: list[int] = []
        for b, one in enumerate(sequences):
            own = sorted(set(one.positions))
            offset = 0 if length is None else length - len(one.input_ids)
            rows.append([offset + position for position in own or [0]])
            source += [len(distinct) + own.index(position) for position in one.positions]
            distinct += [(b, column) for column in range(len(own))]
        width = max(map(len, rows))
        table = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])
        return cls(sequences, table, distinct, source)

    def answered(self, adapters: Adapters, states: Tensor, members: int) -> Answered:
        """The sequences with their log-probabilities, from the states (M·B, S, D)."""
        device = states.device
        targets = torch.tensor([t for one in self.sequences for t in one.targets], dtype=torch.int64, device=device)
        rows, columns = torch.tensor(self.distinct, dtype=torch.int64, device=device).view(-1, 2).T
        of_places = states.view(members, len(self.sequences), *states.shape[1:])[:, rows, columns]
        source = torch.tensor(self.source, dtype=torch.int64, device=device)
        table = log_probs_at(head_of(adapters.model), of_places, source, targets).cpu().numpy()
        ends = np.cumsum([len(one.targets) for one in self.sequences])
        return list(zip(self.sequences, np.split(table, ends[:-1], axis=1), strict=True))


def _text(sequence: Scored) -> Encoded:
    return Encoded(sequence.example, sequence.input_ids, (IGNORE_INDEX,) * len(sequence.input_ids))
