"""The member axis: which (adapter, mask draw) each block of rows of a forward pass belongs to.

A forward of M members takes M·B rows, member-major: rows [m·B, (m+1)·B) are member m's. Or the rows of all members,
in that order, are laid end to end in one row of N tokens: no padding, and members need not have equally many
(`EndToEnd`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.errors import LoradropError

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """(adapter, mask draw or none)."""

    adapter: int | None = 0
    """Index of the adapter; None = the base model alone."""
    draw: int | None = None
    """Mask draw; None = the mask-free, mean-field read-out."""


@dataclass(frozen=True)
class MaskKey:
    """What the mask draws of one pass of one run are keyed by."""

    seed: int
    """Run seed."""
    phase: int | str
    """0-based optimizer step in training, a name such as "test" elsewhere."""


@dataclass(frozen=True)
class RowKeys:
    """What the stateless activation masks of the current rows are keyed by."""

    seeds: tuple[int, ...]
    """64-bit key of each member's `MaskKey`."""
    branch: Tensor
    """(M·B,) int64: the draw of each row; -1 = no activation mask for this row."""
    example: Tensor
    """(M·B,) int64: identity of the row's example in the data set; (M·B, T) where rows pack several examples."""
    position: Tensor
    """(M·B, T) int64: token position within the example (padding has any value)."""
    counts: tuple[int, ...] = ()
    """Rows of each member; () = equally many. Rows laid end to end are as many rows of one token each."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each member."""
        return self.counts or (len(self.branch) // len(self.seeds),) * len(self.seeds)

    def rows_of(self, first: int, end: int) -> slice:
        """The rows of members first … end - 1."""
        return slice(sum(self.rows[:first]), sum(self.rows[:end]))


@dataclass(frozen=True)
class AttentionRows:
    """Rows of similar length as attention computes them: R rows, padded on the right to T tokens."""

    counts: tuple[int, ...]
    """Rows of each member; R in all."""
    length: int
    """T."""
    keys: RowKeys | None
    """Of these rows."""


@dataclass(frozen=True)
class EndToEnd:
    """Rows laid end to end in one row of N tokens, and how attention, which works row by row, sorts them again."""

    tokens: tuple[int, ...]
    """Of each member; N in all."""
    groups: tuple[AttentionRows, ...]
    source: Tensor
    """(P,) int64: token at each place of the groups' rows, which follow one another; N on padding."""
    place: Tensor
    """(N,) int64: place of each token."""


@dataclass(frozen=True)
class MemberPlan:
    """Everything the adapted layers need to know about one forward (and its backward) pass."""

    members: tuple[Member, ...]
    rows: int
    """B, rows per member; of rows laid end to end the most that one has."""
    masks: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """layer name -> position -> (M, n) mask, n = I, O or R; absent = nothing is dropped there."""
    row_keys: RowKeys | None = None
    keys: tuple[MaskKey, ...] = ()
    """One per member: what its masks are keyed by; () where no member has a draw."""
    end_to_end: EndToEnd | None = None
    """Set where the rows are laid end to end."""

    @property
    def size(self) -> int:
        """M."""
        return len(self.members)

    def spans(self, vectors: int) -> list[tuple[int, int]]:
        """(first, end) of each member among the `vectors` that a layer receives, rows flattened."""
        even = (vectors // self.size,) * self.size
        ends = list(accumulate(even if self.end_to_end is None else self.end_to_end.tokens))
        return list(zip([0, *ends], ends, strict=False))

    def keys_for(self, inputs: int, layer: str) -> RowKeys:
        """Row keys for a layer that receives `inputs` vectors per member (of rows laid end to end: whatever it has).

        One vector per row (a pooled state) counts as the row's first token.

        Raises:
            MemberAxisError: the plan has no row keys, or they are of other tokens.
        """
        if self.row_keys is None:
            raise MemberAxisError(f"{layer} drops entries token by token: the plan needs row keys (`with_row_keys`)")
        if self.end_to_end is not None:
            return self.row_keys
        tokens = self.row_keys.position.shape[1]
        if inputs == self.rows * tokens:
            return self.row_keys
        if inputs == self.rows:
            example = self.row_keys.example
            first = example if example.dim() == 1 else example[:, :1]
            return replace(self.row_keys, example=first, position=self.row_keys.position[:, :1])
        raise MemberAxisError(
            f"{layer} received {inputs} vectors per member; its rows are {self.rows} × {tokens} tokens"
        )


class MemberAxis:
    """The one place where adapted layers find the active plan.

    Outside `active` every row belongs to adapter 0 without masks. A backward pass belongs inside: layers
    that are recomputed under activation checkpointing read the plan again.
    """

    def __init__(self) -> None:
        self._plan: MemberPlan | None = None
        self._found: dict[Hashable, Any] = {}

    @contextmanager
    def active(self, plan: MemberPlan) -> Iterator[MemberPlan]:
        """Use `plan` within the block; the state before is restored, also after an exception."""
        before, self._plan, self._found = (self._plan, self._found), plan, {}
        try:
            yield plan
        finally:
            self._plan, self._found = before

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """What `find` finds, which within the block of a plan is asked once for each key.

        For what a layer finds out from the plan alone: a recomputation asks again, and a decode asks at every token.
        """
        if self._plan is None:
            return find()
        if key not in self._found:
            self._found[key] = find()
        found: T = self._found[key]
        return found

    def plan_for(self, leading: int, layer: str, vectors: int | None = None) -> MemberPlan:
        """The plan of an input with `leading` rows and `vectors` in all of them.

        Raises:
            MemberAxisError: the input's leading size is not the declared M·B rows; of rows laid end to end, it is not
                one row of their tokens.
        """
        if self._plan is None:
            return MemberPlan((Member(),), leading)
        if self._plan.end_to_end is not None:
            tokens = sum(self._plan.end_to_end.tokens)
            if (leading, vectors) != (1, tokens):
                raise MemberAxisError(
                    f"{layer} received {vectors or 'some'} vectors in {leading} rows; the declared rows lie end to end"
                    f" in one row of {tokens} tokens. Modules that see other inputs (pooled states, experts) are served"
                    " in padded rows only: leave them out of adapter.target_modules."
                )
            return self._plan
        if leading != self._plan.size * self._plan.rows:
            raise MemberAxisError(
                f"{layer} received an input of leading size {leading}; the declared rows are {self._plan.size} members"
                f" × {self._plan.rows} rows. Inputs flattened over tokens or experts (MoE, padding-free models) are"
                " not supported: leave such modules out of adapter.target_modules."
            )
        return self._plan

    @property
    def current(self) -> MemberPlan | None:
        """The active plan, if any."""
        return self._plan


class MemberAxisError(LoradropError):
    """An input does not have the rows that the active plan declares."""


def replicate_rows(rows: Tensor, members: int) -> Tensor:
    """(B, …) -> (M·B, …), member-major."""
    return rows.repeat(members, *([1] * (rows.dim() - 1)))


def same_for_all(values: Sequence[object]) -> bool:
    """Whether all entries are equal (an empty sequence is)."""
    return all(value == values[0] for value in values)


def as_index(values: Sequence[int], device: torch.device) -> Tensor:
    """A long index tensor."""
    return torch.tensor(list(values), dtype=torch.long, device=device)


@lru_cache(maxsize=256)  # every layer of a pass asks for the same, and a copy to a device waits for it
def kept_index(values: tuple[int, ...], device: torch.device) -> Tensor:
    """`as_index` of a few; not to be changed."""
    return as_index(values, device)
