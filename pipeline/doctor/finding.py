"""What one check has found. Standard library only: the doctor works where nothing is installed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import one_line

State = Literal["ok", "note", "skipped", "FAIL"]
COLOURS: dict[State, str] = {"ok": "32", "note": "33", "skipped": "2", "FAIL": "31"}
"""State -> the terminal's number for it; red is for what has to be mended."""
WIDTH = 14
"""Of the longest name of a check."""


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    check: str
    state: State
    detail: str
    remedy: str = ""
    """The command, or the setting, that mends a FAIL."""


def failed(findings: Iterable[Finding]) -> bool:
    """Whether something has to be mended."""
    return any(found.state == "FAIL" for found in findings)


def lines_of(found: Finding, columns: int = 0, colour: bool = False) -> str:
    """A finding for people, its remedy on a line of its own.

    Args:
        columns: where lines are broken; 0: nowhere. A remedy is in one piece, to be copied.
    """
    lines = [f"{found.state:7} {found.check:{WIDTH}} {one_line(found.detail)}"]
    margin = " " * (WIDTH + 9)
    if columns:
        lines = textwrap.wrap(lines[0], max(columns, 40), subsequent_indent=margin, break_on_hyphens=False)
    if found.remedy:
        lines.append(f"{margin}-> {one_line(found.remedy)}")
    if colour:
        lines[0] = f"\x1b[{COLOURS[found.state]}m{lines[0][:7]}\x1b[0m{lines[0][7:]}"
    return "\n".join(lines)
