"""Rows of the table: a terminal shows them, Markdown goes into documents, JSON into files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.targets import TARGETS
from benchmarks.timing import Spread

COLUMNS = ("case", "what", "against", "measured", "min – max", "quartiles", "n", "wanted", "share of the limit")
WRAPPED = ("what", "against", "measured", "wanted")
FILE_WIDTH = 160
DIGITS = {"×": 2, "%": 0, "s": 1, "GB": 1, "tokens/s": 0}
"""Unit -> places behind the point. `×` is a ratio, `%` a share of 1."""


@dataclass(frozen=True)
class Limit:
    """What the machine's matrix products alone allow at this shape, measured in the same rounds."""

    seconds: float
    gflops: float
    """Operations of the products per second, in 10⁹: the rate that was reached."""
    share: Spread
    """Time of the products / time of the work, round by round."""


@dataclass(frozen=True)
class Row:
    """One line: something measured, or the reason why it is not."""

    case: str
    what: str
    against: str = ""
    value: Spread | None = None
    """None: not measured; `note` says why."""
    unit: str = "×"
    target: str = ""
    """Name in `TARGETS`."""
    limit: Limit | None = None
    seconds: tuple[float, ...] = ()
    """Medians of both sides, where times are compared."""
    note: str = ""
    curve: bool = False
    """A point of a scaling curve."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the target spelled out."""
        target = TARGETS.get(self.target)
        wanted = None if target is None else {"name": self.target, **asdict(target), "reached": self.reached()}
        return {**asdict(self), "target": wanted}

    def reached(self) -> bool | None:
        """Whether the median reaches the target; None where there is none, or nothing was measured."""
        target = TARGETS.get(self.target)
        return None if target is None or self.value is None else target.reached_by(self.value.median)

    def cells(self) -> tuple[str, ...]:
        """As people read it, in the order of `COLUMNS`."""
        target = TARGETS.get(self.target)
        wanted = "" if target is None else f"{target.sign} {shown(target.value, self.unit)}"
        if self.reached() is not None:
            wanted += ", reached" if self.reached() else ", missed"
        if self.value is None:
            return (self.case, self.what, self.against, self.note or "not measured", "", "", "", wanted, "")
        value = self.value
        spread = [f"{shown(a, self.unit, '')} – {shown(b, self.unit, '')}" for a, b in (
            (value.low, value.high), (value.lower_quartile, value.upper_quartile)
        )]
        share = "" if self.limit is None else shown(self.limit.share.median, "%")
        what = f"{self.what} ({self.note})" if self.note else self.what
        return (self.case, what, self.against, shown(value.median, self.unit), *spread, str(value.count), wanted, share)


def skipped(case: str, what: str, why: str, target: str = "") -> Row:
    """A row of what this checkout or machine cannot measure."""
    return Row(case, what, target=target, note=f"skipped: {why}")


def shown(value: float, unit: str, tail: str | None = None) -> str:
    """`value` with its unit, or with `tail` in the unit's place."""
    scaled = value * 100 if unit == "%" else value
    end = {"×": "×", "%": " %"}.get(unit, f" {unit}") if tail is None else tail
    return f"{scaled:,.{DIGITS[unit]}f}{end}"


def print_table(rows: Sequence[Row], header: Sequence[str], console: Console | None = None) -> None:
    """For a terminal; wide cells are wrapped."""
    console = console or Console()
    if not console.is_terminal:  # a file has no width of its own
        console.width = FILE_WIDTH
    for line in header:
        console.print(line, markup=False, highlight=False)
    table = Table(show_lines=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column not in WRAPPED)
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)


def markdown(rows: Sequence[Row], header: Sequence[str]) -> str:
    """The same as a Markdown table below the header's lines."""
    lines = [*(f"- {line}" for line in header), "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    return "\n".join([*lines, *(_line(row.cells()) for row in rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def document(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """What `--json` writes: facts about the machine and versions, and every row, curves included."""
    return {"facts": facts, "rows": [row.as_dict() for row in rows]}
