"""Which messages for users no test reaches: `python tests/messages.py [arguments of pytest]`.

A message is a place in `pipeline/` or `tune/` that makes a `UserError` or one of its kinds, or a `ValueError` that a
validator of the configuration raises. It is reached where the interpreter gets to its line in the process of the tests;
what only a process that they start reaches is listed, too.
"""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "UserError", "ConfigError", "DataError", "RunFolderError", "SetupError", "AnswerTooLong", "ColumnError", "NoPlan",
    "YamlFault", "JsonFault", "refusal",
}


def messages(path: Path) -> Iterator[tuple[int, int]]:
    """(first line, last line) of every place of a file that makes a message."""
    kinds = KINDS | ({"ValueError"} if path.parent.name == "config" else set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            yield node.lineno, node.end_lineno or node.lineno


class Reached:
    """A plugin of pytest that notes which of the lines are executed."""

    def __init__(self, lines: dict[str, set[int]]) -> None:
        self.lines = lines
        self.found: set[tuple[str, int]] = set()
        self.within: dict[Any, bool] = {}

    def called(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Follow the functions that have such a line, and no others."""
        code = frame.f_code
        if code not in self.within:
            wanted = self.lines.get(code.co_filename, set())
            self.within[code] = any(line in wanted for _, _, line in code.co_lines() if line is not None)
        return self.stepped if self.within[code] else None

    def stepped(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Note a line."""
        if event == "line" and frame.f_lineno in self.lines[frame.f_code.co_filename]:
            self.found.add((frame.f_code.co_filename, frame.f_lineno))
        return self.stepped

    def pytest_runtest_setup(self) -> None:
        """Before each test: one that traces by itself may have ended this."""
        threading.settrace(self.called)
        sys.settrace(self.called)

    def pytest_runtest_call(self) -> None:
        """Likewise."""
        sys.settrace(self.called)


def main(arguments: list[str]) -> int:
    """Run the tests, then list the messages that they have not reached."""
    files = [path for room in ("pipeline", "tune") for path in sorted((ROOT / room).rglob("*.py"))]
    places = [(str(path), *place) for path in files for place in messages(path)]
    lines: dict[str, set[int]] = {}
    for name, first, last in places:
        lines.setdefault(name, set()).update(range(first, last + 1))
    reached = Reached(lines)
    code = pytest.main([str(ROOT / "tests"), "-q", *arguments], plugins=[reached])
    sys.settrace(None)
    missed = [
        (name, first, last) for name, first, last in places
        if not any((name, line) in reached.found for line in range(first, last + 1))
    ]
    for name, first, last in missed:
        text = " ".join(line.strip() for line in Path(name).read_text().splitlines()[first - 1 : last])
        print(f"{Path(name).relative_to(ROOT)}:{first}: {text[:200]}")
    print(f"{len(places)} messages, {len(missed)} of which no test has reached")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
