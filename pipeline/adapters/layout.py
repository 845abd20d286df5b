"""How the examples of a micro-batch are laid out along the member axis while training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.adapters.members import Member
from pipeline.config.method import Consistency


@dataclass(frozen=True)
class Pairing:
    """Which rows of a layout are branches of the same example."""

    branches: int
    """G: members p·G … p·G + G-1 have the same examples in the same rows."""
    weights: tuple[float, ...]
    """(M·B) weight of the row's example in the consistency term; 0 for fillers."""
    reference: RowLayout | None = None
    """The branches that carry no gradient, as a layout of their own; None where all branches do."""
    reference_branches: int = 0
    """F: how many they are per example."""


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
    pairing: Pairing | None = None
    """Set where examples are compared under several draws."""


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
    pairing = Pairing(len(moving), weights, reference, len(others))
    return replace(_branched(pairs, moving, parts), pairing=pairing)


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


def weightless(layout: RowLayout) -> RowLayout:
    """The same rows, none of which counts in any part of the loss."""
    nothing = (0.0,) * len(layout.weights)
    pairing = None if layout.pairing is None else replace(layout.pairing, weights=nothing)
    return replace(layout, weights=nothing, pairing=pairing)


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
