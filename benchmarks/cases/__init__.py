"""The cases by name, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module

from benchmarks.setting import Setting
from benchmarks.table import Row


@dataclass(frozen=True)
class Case:
    """Something that is measured by itself, and gives some rows."""

    name: str
    help: str
    place: str
    """module:function of a `Setting`."""
    targets: tuple[str, ...] = ()
    """Names in `benchmarks.targets.TARGETS` that its rows are held to."""
    commands: bool = False
    """Whole commands are timed: minutes each, and `--against` counts."""
    asked: bool = False
    """Only where it is named."""

    def run(self, setting: Setting) -> Iterable[Row]:
        """Measure."""
        module, _, function = self.place.partition(":")
        work: Callable[[Setting], Iterable[Row]] = getattr(import_module(f"benchmarks.cases.{module}"), function)
        return work(setting)


CASES = {
    case.name: case
    for case in (
        Case("step", "a training step of LoRA Dropout: stock PEFT, products, replicate", "step:rows",
             ("step against plain PEFT", "step against PEFT with dropout", "share of a step", "replicate")),
        Case("forward", "8 mask members in one pass: one at a time, products", "forward:rows", ("share of a forward",)),
        Case("packs", "packed runs: the same passes one after another, products", "packs:rows",
             ("8 packed runs", "4 packed runs")),
        Case("pack-memory", "memory of a pack of 8 runs: one run", "pack_memory:rows", ("memory of a pack",)),
        Case("prediction", "13 members over rows of the default task: products", "prediction:rows"),
        Case("first-step", "seconds to the first step of train", "whole:first_step", ("first step",), True),
        Case("trainer", "the default recipe's training steps in the whole trainer", "whole:trainer",
             ("trainer step",), True),
        Case("evaluate", "evaluation of 13 members", "whole:evaluate", ("evaluation",), True),
        Case("search", "the default search", "whole:search", ("search",), True),
        Case("factors", "a search: unpacked, packed, with early exit, both", "factors:rows",
             ("packing and early exit",), True),
        Case("line", "the whole line, and evaluation and steps within it", "whole:line", ("line",), True),
        Case("compare", "a comparison of 12 cells", "whole:compare", ("compare",), True),
        Case("large", "an 8B-shaped base on a GPU", "large:rows",
             ("8B tokens", "8B memory", "8B against PEFT", "8B packed runs", "8B decode"), asked=True),
        Case("curves", "scaling against members, rank, length and runs in a pack", "curves:rows", asked=True),
    )
}  # fmt: skip
