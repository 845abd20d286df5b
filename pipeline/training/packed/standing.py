"""How far a pack has come, and how that is shown; several packs add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.terminal import Progress


@dataclass(frozen=True)
class Standing:
    """What is left to do."""

    steps_left: int
    """Of active and waiting runs."""
    active: int
    waiting: int

    def __add__(self, other: Standing) -> Standing:
        return Standing(
            self.steps_left + other.steps_left, self.active + other.active, self.waiting + other.waiting
        )


def shown(steps: int) -> Callable[[Standing], None]:
    """Show each standing of packs that began with so many steps before them."""
    progress = Progress(steps, 0, enabled=True)

    def show(standing: Standing) -> None:
        parts = [f"{standing.active} runs share their passes, {standing.waiting} wait"]
        progress.show(steps - standing.steps_left, parts)
        if not standing.active and not standing.waiting:
            progress.close()

    return show
