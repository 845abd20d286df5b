"""Encoded rows -> tensors: padded rows, or one row of them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.randomness import key64


@dataclass
class Batch:
    """B rows padded to T tokens; all tensors are (B, T) int64 but `scores`."""

    input_ids: Tensor
    attention_mask: Tensor
    """1 for real tokens, 0 for padding, whatever ids they have."""
    labels: Tensor
    """As in `Encoded`, unshifted; IGNORE_INDEX on padding."""
    position_ids: Tensor
    """Real tokens counted from 0 in every example, whatever the padding side; 0 on padding."""
    example_ids: list[str]
    """(B) row ids."""
    parts: list[list[tuple[str, slice]]]
    """Per row the examples in it: (row id, their tokens)."""
    token_types: Tensor | None = None
    """Segment of each token, 0 on padding; None where no row has segments."""
    scores: Tensor | None = None
    """(B,) float32 numbers to be predicted; None where rows are answered otherwise."""

    @property
    def packed(self) -> bool:
        """Whether some row holds several examples."""
        return any(len(parts) > 1 for parts in self.parts)

    def tensors(self, device: torch.device | str) -> dict[str, Tensor]:
        """The tensors that there are by name, on a device."""
        named = {
            "input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids,
            "labels": self.labels, "token_type_ids": self.token_types, "scores": self.scores,
        }
        return {name: tensor.to(device) for name, tensor in named.items() if tensor is not None}


def collate(
    encoded: Sequence[Encoded],
    pad_id: int,
    side: Literal["left", "right"] = "left",
    multiple_of: int = 1,
    length: int | None = None,
) -> Batch:
    """Pad rows to a common length T.

    Args:
        encoded: B rows, at least one.
        pad_id: id written on padding; it may be that of a real token.
        side: where padding goes.
        multiple_of: T is rounded up to a multiple of this.
        length: T itself, instead of the longest row's length.

    Raises:
        ValueError: no rows, or a row longer than `length`.
    """
    if not encoded:
        raise ValueError("collate needs at least one row")
    longest = max(len(row.input_ids) for row in encoded)
    total = -(-longest // multiple_of) * multiple_of if length is None else length
    if longest > total:
        raise ValueError(f"a row has {longest} tokens, more than length = {total}")
    ids = torch.full((len(encoded), total), pad_id, dtype=torch.int64)
    mask, labels, positions = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    types = torch.zeros_like(ids) if any(row.token_types is not None for row in encoded) else None
    parts = []
    numbers = [row.score for row in encoded if row.score is not None]
    for i, row in enumerate(encoded):
        count = len(row.input_ids)
        span = slice(total - count, total) if side == "left" else slice(count)
        ids[i, span] = torch.tensor(row.input_ids)
        mask[i, span] = 1
        labels[i, span] = torch.tensor(row.labels)
        parts.append(_places(row, span.start or 0))
        for _, place in parts[-1]:
            positions[i, place] = torch.arange(place.stop - place.start)
        if types is not None and row.token_types is not None:
            types[i, span] = torch.tensor(row.token_types)
    scores = torch.tensor(numbers, dtype=torch.float32) if len(numbers) == len(encoded) else None
    return Batch(ids, mask, labels, positions, [row.example for row in encoded], parts, types, scores)


@dataclass
class Line:
    """Rows laid end to end; all tensors are (1, N) int64."""

    input_ids: Tensor
    attention_mask: Tensor
    """1: all tokens are real."""
    labels: Tensor
    """As in `Encoded`, unshifted; IGNORE_INDEX on the first token of every row: nothing of its own precedes it."""
    position_ids: Tensor
    """Counted from 0 in every row."""
    token_rows: Tensor
    """Index of the row that a token is of."""

    def tensors(self, device: torch.device | str) -> dict[str, Tensor]:
        """By name, on a device."""
        return {name: tensor.to(device) for name, tensor in vars(self).items()}


def lay_in_line(encoded: Sequence[Encoded]) -> Line:
    """Rows one behind the other, without padding.

    Args:
        encoded: one example each, at least one.
    """
    lengths = torch.tensor([len(row.input_ids) for row in encoded])
    ids = torch.tensor([[token for row in encoded for token in row.input_ids]])
    labels = [label for row in encoded for label in (IGNORE_INDEX, *row.labels[1:])]
    return Line(
        ids, torch.ones_like(ids), torch.tensor([labels]),
        torch.cat([torch.arange(length) for length in lengths.tolist()]).unsqueeze(0),
        torch.arange(len(encoded)).repeat_interleave(lengths).unsqueeze(0),
    )


def _places(row: Encoded, start: int) -> list[tuple[str, slice]]:
    ends = list(accumulate((len(part.input_ids) for part in row.parts), initial=start))
    return [(part.example, slice(begin, end)) for part, begin, end in zip(row.parts, ends, ends[1:], strict=False)]


def filler(length: int = 1) -> Encoded:
    """A row of `length` tokens that carries no loss: it fills up members to an equal number of rows.

    It has real (attended) tokens, so that no attention row is empty.
    """
    return Encoded("", (0,) * length, (IGNORE_INDEX,) * length)


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
    return torch.tensor([key64("example", name) >> 1 for name in example_ids], dtype=torch.int64)  # 63 bits fit
