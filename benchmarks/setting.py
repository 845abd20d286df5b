"""What the command line asked for, as every case reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkout import Checkout
from benchmarks.timing import Times, Work, alternate, clock


@dataclass(frozen=True)
class Scale:
    """How much is measured. Shapes of single passes stay: a figure at another shape would be another figure."""

    rounds: int
    """Of works within this process."""
    commands: int
    """Rounds of whole commands."""
    long: int
    """Rounds of the commands that take longest: the line, the comparison, the search in four ways."""
    rows: tuple[str, ...]
    """Overrides: the rows of whole commands."""
    steps: tuple[str, ...]
    """Overrides: their steps, trials and draws."""
    trials: int
    """Of the search whose three factors are told apart."""
    seeds: int
    """Of the comparison: six times as many cells."""
    predicted: int
    """Rows of the prediction within this process."""


SCALES = {
    "full": Scale(
        rounds=9, commands=3, long=1,
        rows=("data.train_rows=150", "data.validation_rows=200", "data.calibration_rows=200", "data.test_rows=400"),
        steps=(
            "train.max_steps=30", "train.validate_every_steps=10", "train.checkpoint_every_steps=15",
            "search.trials=4", "search.max_steps=6",
        ),
        trials=16, seeds=2, predicted=64,
    ),
    "small": Scale(
        rounds=2, commands=1, long=1,
        rows=("data.train_rows=48", "data.validation_rows=16", "data.calibration_rows=16", "data.test_rows=16"),
        steps=(
            "train.max_steps=3", "train.validate_every_steps=3", "train.checkpoint_every_steps=3",
            "search.trials=2", "search.max_steps=2",
        ),
        trials=4, seeds=1, predicted=8,
    ),
}  # fmt: skip
"""`full` is the default recipe as it was at commit 09e95c6, spelled out: checkouts are given the same work."""


@dataclass(frozen=True)
class Setting:
    """One start of the benchmarks."""

    scale: Scale
    folder: Path
    """For run folders; removed in the end."""
    here: Checkout
    against: Checkout | None = None
    device: str = "cpu"
    clock: str = "wall"
    repeats: int | None = None
    """Takes the place of the scale's rounds."""
    overrides: tuple[str, ...] = ()
    """On top of everything, on every side."""
    keep: Path | None = None
    """Where run folders of whole commands go after they were timed; None: nowhere."""

    def alternate(self, works: dict[str, Work]) -> Times:
        """Time works of this process in turn."""
        return alternate(works, self.repeats or self.scale.rounds, clock(self.clock, self.device))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Compute dtypes of passes; where both are timed, the faster one counts."""
        return ("bfloat16",) if self.device.startswith("cuda") else ("float32", "bfloat16")

    @property
    def commands(self) -> int:
        """Rounds of whole commands."""
        return self.repeats or self.scale.commands

    @property
    def long(self) -> int:
        """Rounds of the longest ones."""
        return self.repeats or self.scale.long

    @property
    def sides(self) -> dict[str, Checkout]:
        """This checkout, and the other one where there is one."""
        return {"here": self.here} | ({} if self.against is None else {"there": self.against})

    def work_of_default(self, checkout: Checkout, *more: str) -> list[str]:
        """Overrides that give a checkout the default recipe's work as the scale has it.

        Plain LoRA as an arm of a search of its own is left out where a checkout knows it: the other one has as many
        trials less.
        """
        plain = ["search.plain=false"] if checkout.knows("search.plain") else []
        return [*self.scale.rows, *self.scale.steps, *plain, *more, *self.overrides]


