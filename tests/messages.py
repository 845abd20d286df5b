"""Which messages for users no test reaches: `python tests/messages.py [arguments of pytest]`.

A message is a place in `pipeline/` or `tune/` that makes a `UserError` or one of its kinds, or a `ValueError` that a
validator of the configuration raises. It is reached where coverage.py has seen one of its lines, in the process of the
tests or in one that they start.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "UserError", "ConfigError", "DataError", "RunFolderError", "SetupError", "AnswerTooLong", "ColumnError", "NoPlan",
    "YamlFault", "JsonFault", "refusal",
}
SETTINGS = f"""[run]
branch = False
parallel = True
patch = subprocess
source = {ROOT / 'pipeline'}, {ROOT / 'tune'}
"""


def messages(path: Path) -> Iterator[tuple[int, int]]:
    """(first line, last line) of every place of a file that makes a message."""
    kinds = KINDS | ({"ValueError"} if path.parent.name == "config" else set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            yield node.lineno, node.end_lineno or node.lineno


def lines_reached(arguments: list[str], folder: str) -> tuple[CoverageData, int]:
    """What the tests execute, and pytest's exit code."""
    settings = Path(folder, "settings")
    settings.write_text(SETTINGS)
    environment = {**os.environ, "COVERAGE_FILE": f"{folder}/found", "PYTHONPATH": str(ROOT)}
    coverage = [sys.executable, "-m", "coverage"]
    tests = ["-m", "pytest", "-q", *(arguments or ["tests"])]
    code = subprocess.run([*coverage, "run", f"--rcfile={settings}", *tests], cwd=ROOT, env=environment, check=False)
    subprocess.run([*coverage, "combine", "-q", f"--rcfile={settings}", folder], env=environment, check=True)
    found = CoverageData(f"{folder}/found")
    found.read()
    return found, code.returncode


def main(arguments: list[str]) -> int:
    """Run the tests, then list the messages that they have not reached."""
    with tempfile.TemporaryDirectory() as folder:
        found, code = lines_reached(arguments, folder)
        count = missed = 0
        for path in (path for room in ("pipeline", "tune") for path in sorted((ROOT / room).rglob("*.py"))):
            reached = set(found.lines(str(path)) or ())
            for first, last in messages(path):
                count += 1
                if reached.isdisjoint(range(first, last + 1)):
                    missed += 1
                    text = " ".join(line.strip() for line in path.read_text().splitlines()[first - 1 : last])
                    print(f"{path.relative_to(ROOT)}:{first}: {text[:200]}")
    print(f"{count} messages, {missed} of which no test has reached")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
