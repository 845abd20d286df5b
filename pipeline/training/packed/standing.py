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
    """Show each standing of packs whose runs have so many steps in all; the time left goes by those since the first."""
    progress: Progress | None = None

    def show(standing: Standing) -> None:
        nonlocal progress
        done = steps - standing.steps_left
        progress = progress or Progress(steps, done, enabled=True)
        progress.show(done, [f"{standing.active} runs share their passes, {standing.waiting} wait"])
        if not standing.active and not standing.waiting:
            progress.close()

    return show
