"""How the examples of a micro-batch are laid out along the member axis while training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from pipeline.adapters.members import Member
from pipeline.config.method import Consistency

T = TypeVar("T")


@dataclass(frozen=True)
class Pairing:
    """Which rows of a run are branches of the same example."""

    branches: int
    """G: the run's members p·G … p·G + G-1 have the same examples in the same rows."""
    weights: tuple[float, ...]
    """Of each of the run's rows: the weight of its example in the consistency term; 0 for fillers."""
    reference: RowLayout | None = None
    """The branches that carry no gradient, as a layout of their own; None where all branches do."""
    reference_branches: int = 0
    """F: how many they are per example."""
    kind: Literal["kl", "js"] = "kl"
    """How far apart they are is measured by this."""
    first: int = 0
    """The run's first member in the layout."""


@dataclass(frozen=True)
class RowLayout:
    """M·B rows, member-major, equally many for every member."""

    members: tuple[Member, ...]
    rows: int
    """B."""
    source: tuple[int, ...]
    """(M·B) index of the example in the micro-batch; fillers repeat an example."""
    weights: tuple[float, ...]
    """(M·B) weight in the supervised loss; 0 for fillers."""
    pairings: tuple[Pairing, ...] = ()
    """Of each run whose examples are compared under several draws."""

    @property
    def pairing(self) -> Pairing | None:
        """Of a layout of one run."""
        return self.pairings[0] if self.pairings else None

    @property
    def adapters(self) -> tuple[int | None, ...]:
        """Whose rows they are, in the order in which they come."""
        return tuple(dict.fromkeys(member.adapter for member in self.members))

    @property
    def real(self) -> tuple[int, ...]:
        """Indices of the rows that are no fillers: the first of each example under its member."""
        first: dict[tuple[int, int], int] = {}
        for row, source in enumerate(self.source):
            first.setdefault((row // self.rows, source), row)
        return tuple(first.values())


def split_layout(positions: Sequence[int], draws: int, adapter: int = 0) -> RowLayout:
    """Divide examples among S draws: draw = position in the *global* batch mod S.

    The cost of plain LoRA; over the draws, the expected gradient of `replicate`. The draw of an example does
    not depend on how the global batch is cut into processes and micro-batches.
    """
    by_draw: dict[int, list[int]] = {}
    for index, position in enumerate(positions):
        by_draw.setdefault(position % draws, []).append(index)
    rows = max(len(indices) for indices in by_draw.values())
    members, source, weights = [], [], []
    for draw, indices in sorted(by_draw.items()):
        fillers = rows - len(indices)
        members.append(Member(adapter, draw))
        source.extend(indices + indices[:1] * fillers)
        weights.extend([1.0] * len(indices) + [0.0] * fillers)
    return RowLayout(tuple(members), rows, tuple(source), tuple(weights))


def replicate_layout(examples: int, draws: int, adapter: int = 0) -> RowLayout:
    """Every example under every draw: L = (1/S) Σ_s l(x; m_s)   (arXiv 2404.09610, eq. 7)."""
    members = tuple(Member(adapter, draw) for draw in range(draws))
    return RowLayout(members, examples, tuple(range(examples)) * draws, (1.0 / draws,) * (examples * draws))


def plain_layout(examples: int, adapter: int = 0) -> RowLayout:
    """No draw at all: nothing is masked."""
    return RowLayout((Member(adapter),), examples, tuple(range(examples)), (1.0,) * examples)


def paired_layout(pairs: RowLayout, consistency: Consistency) -> RowLayout:
    """Put every example of each "draw" p of `pairs` under the two draws 2p and 2p + 1, `js` also under no draw.

    With gradient through `both`, all branches are members of one pass; the supervised loss is the mean over the two
    draws (R-Drop, arXiv 2106.14448, up to its factor 2), the mask-free branch has no part in it. With gradient through
    `one`, the pass has draw 2p alone, which then carries the whole supervised loss, and the other branches are the
    `reference`. The example's weight in the consistency term is its weight in `pairs`.
    """
    size = 3 if consistency.kind == "js" else 2
    parts = (0.5, 0.5, 0.0)[:size] if consistency.branches == "both" else (1.0,)
    moving, others = range(len(parts)), range(len(parts), size)
    weights = _branched(pairs, moving, [1.0] * len(moving)).weights
    reference = _branched(pairs, others, [0.0] * len(others)) if others else None
    pairing = Pairing(len(moving), weights, reference, len(others), "js" if consistency.kind == "js" else "kl")
    return replace(_branched(pairs, moving, parts), pairings=(pairing,))


def training_layout(
    positions: Sequence[int], draws: int, kind: str, masked: bool, consistency: Consistency | None = None
) -> RowLayout:
    """The layout that `train.draws`, `train.draw_layout` and the method's consistency term ask for.

    With a term the S draws are S/2 pairs: under `split` each example is in exactly one, under `replicate` in all.
    Where nothing is masked all branches are equal: no draw, no pair.
    """
    if not masked:
        return plain_layout(len(positions))
    paired = consistency is not None and consistency.kind != "none"
    count = draws // 2 if paired else draws
    layout = split_layout(positions, count) if kind == "split" else replicate_layout(len(positions), count)
    return paired_layout(layout, consistency) if paired else layout  # type: ignore[arg-type]


def weighed(layout: RowLayout, weights: Sequence[float]) -> RowLayout:
    """The same rows, each with its example's weight in every part of the loss.

    Args:
        weights: of the examples, as `source` numbers them.
    """
    if all(weight == 1.0 for weight in weights):
        return layout

    def of_rows(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(value * weights[source] for value, source in zip(values, layout.source, strict=True))

    pairings = tuple(replace(pairing, weights=of_rows(pairing.weights)) for pairing in layout.pairings)
    return replace(layout, weights=of_rows(layout.weights), pairings=pairings)


def weightless(layout: RowLayout) -> RowLayout:
    """The same rows, none of which counts in any part of the loss."""
    nothing = (0.0,) * len(layout.weights)
    pairings = tuple(replace(pairing, weights=(0.0,) * len(pairing.weights)) for pairing in layout.pairings)
    return replace(layout, weights=nothing, pairings=pairings)


def of_adapter(layout: RowLayout, adapter: int) -> RowLayout:
    """The layout of a run alone, adapter 0, as that of the same run in the slot `adapter` of a pack."""
    members = tuple(replace(member, adapter=adapter) for member in layout.members)
    pairings = tuple(
        replace(one, reference=None if one.reference is None else of_adapter(one.reference, adapter))
        for one in layout.pairings
    )
    return replace(layout, members=members, pairings=pairings)


def joined(layouts: Sequence[RowLayout], examples: Sequence[int], least: int = 1) -> RowLayout:
    """The micro-batches of several runs as one, run by run; members that have fewer rows get fillers.

    Args:
        examples: how many each of them has; in the result they are numbered through.
        least: rows per member.
    """
    rows, first, offset = max(least, *(layout.rows for layout in layouts)), 0, 0
    members: list[Member] = []
    source: list[int] = []
    weights: list[float] = []
    pairings: list[Pairing] = []
    for layout, count in zip(layouts, examples, strict=True):
        source += [index + offset for index in _filled(layout.source, layout.rows, rows)]
        weights += _filled(layout.weights, layout.rows, rows, 0.0)
        for one in layout.pairings:
            reference = None if one.reference is None else _shifted(one.reference, offset)
            wide = tuple(_filled(one.weights, layout.rows, rows, 0.0))
            pairings.append(replace(one, weights=wide, reference=reference, first=first + one.first))
        members += layout.members
        first, offset = first + len(layout.members), offset + count
    return RowLayout(tuple(members), rows, tuple(source), tuple(weights), tuple(pairings))


def reference_of(layout: RowLayout) -> RowLayout | None:
    """The branches without gradient of all its runs, one run after the other; None where there are none.

    They have the rows of the branches with gradient, fillers included.
    """
    found = [one.reference for one in layout.pairings if one.reference is not None]
    return joined(found, [0] * len(found), layout.rows) if found else None


def _filled(values: Sequence[T], rows: int, wanted: int, filler: T | None = None) -> list[T]:
    """Those of each member followed by fillers: the given one, or its own first value."""
    found: list[T] = []
    for start in range(0, len(values), rows):
        found += [*values[start : start + rows], *[values[start] if filler is None else filler] * (wanted - rows)]
    return found


def _shifted(layout: RowLayout, offset: int) -> RowLayout:
    return replace(layout, source=tuple(index + offset for index in layout.source))


def _branched(pairs: RowLayout, branches: Sequence[int], parts: Sequence[float]) -> RowLayout:
    """Every pair replaced by the chosen of its branches 0, 1 (its draws) and 2 (no draw), which share its examples.

    `parts`: how much of an example's weight each of them gets.
    """
    members: list[Member] = []
    source: list[int] = []
    weights: list[float] = []
    for p, pair in enumerate(pairs.members):
        own = slice(p * pairs.rows, (p + 1) * pairs.rows)
        for branch, part in zip(branches, parts, strict=True):
            members.append(_branch(pair, branch))
            source.extend(pairs.source[own])
            weights.extend(weight * part for weight in pairs.weights[own])
    return RowLayout(tuple(members), pairs.rows, tuple(source), tuple(weights))


def _branch(pair: Member, branch: int) -> Member:
    """A pair's number stands in `Member.draw`."""
    return Member(pair.adapter, 2 * pair.draw + branch if pair.draw is not None and branch < 2 else None)
