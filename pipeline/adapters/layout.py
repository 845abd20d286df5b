"""How the examples of a micro-batch are laid out along the member axis while training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.adapters.members import Member


@dataclass(frozen=True)
class RowLayout:
    """M·B rows, member-major, equally many for every member."""

    members: tuple[Member, ...]
    rows: int
    """B."""
    source: tuple[int, ...]
    """(M·B) index of the example in the micro-batch; fillers repeat an example."""
    weights: tuple[float, ...]
    """(M·B) weight in the loss; 0 for fillers."""


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


def training_layout(positions: Sequence[int], draws: int, kind: str, masked: bool) -> RowLayout:
    """The layout that `train.draws` and `train.draw_layout` ask for."""
    if not masked:
        return plain_layout(len(positions))
    return split_layout(positions, draws) if kind == "split" else replicate_layout(len(positions), draws)
