"""Several short examples in one row, each by itself: positions restart, attention and masks stay within an example.

Which lengths share a row is decided once, by best fit over the sorted lengths (a row holds at most `capacity` tokens).
Which examples those are is drawn anew in every epoch among examples of equal length, so the number of rows is the same
in every epoch and a row is a function of (seed, epoch, row) alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.encode import Encoded
from pipeline.data.sampler import permutation

_PACKING = 2**32
"""Added to an epoch, so that the order of examples is drawn apart from the order of rows."""


@dataclass(frozen=True)
class Packed(Encoded):
    """A row of several examples, one behind the other; `input_ids` and `labels` are theirs in that order."""

    members: tuple[Encoded, ...] = ()

    @property
    def parts(self) -> tuple[Encoded, ...]:
        """The examples."""
        return self.members


def pack(examples: Sequence[Encoded]) -> Encoded:
    """One row of all `examples`; a single one stays as it is."""
    if len(examples) == 1:
        return examples[0]
    ids = tuple(token for example in examples for token in example.input_ids)
    labels = tuple(label for example in examples for label in example.labels)
    return Packed("+".join(example.example for example in examples), ids, labels, members=tuple(examples))


class PackedRows:
    """All examples as packed rows, in every epoch."""

    def __init__(self, examples: Sequence[Encoded], lengths: Sequence[int], capacity: int, seed: int) -> None:
        """`lengths`: tokens of each example, at most `capacity`."""
        self._examples, self._seed = examples, seed
        self._lengths = np.asarray(lengths)
        self._slots = best_fit(sorted(lengths, reverse=True), capacity)
        self._order_of = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return len(self._slots)

    def row(self, epoch: int, index: int) -> Encoded:
        """Row `index` of an epoch."""
        order = self._order_of(epoch)
        return pack([self._examples[int(order[slot])] for slot in self._slots[index]])

    def length(self, epoch: int, index: int) -> int:
        """Its tokens."""
        order = self._order_of(epoch)
        return int(sum(self._lengths[order[slot]] for slot in self._slots[index]))

    def _order(self, epoch: int) -> NDArray[np.intp]:
        """Examples by falling length, those of one length in the epoch's order."""
        shuffled = permutation(len(self._lengths), self._seed, epoch + _PACKING)
        return shuffled[np.argsort(-self._lengths[shuffled], kind="stable")]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped so that no group exceeds `capacity`: each goes where it leaves the least room.

    Args:
        lengths: from the longest to the shortest.
    """
    groups: list[list[int]] = []
    rooms: list[int] = []  # the different rooms that groups have left, rising
    groups_with: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            group, room = len(groups), capacity
            groups.append([])
        else:
            room = rooms[place]
            group = groups_with[room].pop()
            if not groups_with[room]:
                del rooms[place]
        groups[group].append(index)
        left = room - length
        if not groups_with.setdefault(left, []):
            insort(rooms, left)
        groups_with[left].append(group)
    return groups
