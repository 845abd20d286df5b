"""Hostile cases: no traceback, no hang, no raw control character, nothing left behind; the fuzzer sees each of them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.fuzz import material, sandbox
from helpers.fuzz.case import Case, Item
from helpers.fuzz.kinds import HEAVY, KINDS, make_case, numbers_of

SEED = 1
FAST = {kind: 25 if kind in HEAVY else 95 for kind in KINDS}


def fuzz(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_cases_are_refused_or_accepted(kind: str) -> None:
    said = fuzz("--kind", kind, "--cases", str(FAST[kind]), "--seed", str(SEED))
    counts = [int(number) for number in re.findall(r"\d+", said.splitlines()[-1])]
    assert sum(FAST.values()) >= 500 and sum(counts) == FAST[kind]
    assert counts[0] > 0 and counts[1] > 0 and not any(counts[2:])  # some are refused, some are not


def test_a_case_is_a_function_of_its_numbers() -> None:
    for number in range(3 * len(KINDS)):
        case = make_case(SEED, number)
        assert case == make_case(SEED, number) and case.kind == list(KINDS)[number % 6]
    assert make_case(SEED, 5) != make_case(SEED + 1, 5)
    assert numbers_of("configuration", 3) == [1, 7, 13]


FAULTS = {
    "traceback": "raise ValueError('x')",
    "hang": "__import__('time').sleep(60)",
    "busy": "while True: pass",
    "control": "print('a\\x1b[2Jb')",
    "silent": "return 2",
    "code": "return 1",
    "leftover": "open('left', 'w').close()",
    "accepted": "return 0",
    "refused": "__import__('sys').stderr.write('loradrop: train.seed = x: must be a number.\\n'); return 2",
}


@pytest.mark.parametrize("outcome", FAULTS)
def test_the_fuzzer_sees_what_is_wrong(outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def misbehave(argv: list[str]) -> int:
        names: dict[str, object] = {}
        exec(f"def act():\n    {FAULTS[outcome]}\n    return 0\n", names)
        act = names["act"]
        assert callable(act)
        return int(act())

    monkeypatch.setattr("pipeline.cli.main", misbehave)
    monkeypatch.setattr(sandbox, "DEADLINE_S", 1)
    ended = sandbox.run_case(Case("command_line", ("train",)), tmp_path, tmp_path)
    assert ended.outcome == outcome.replace("busy", "hang"), ended
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["changed", "removed", "signal", "process", "network"])
def test_the_fuzzer_sees_what_was_done(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def misbehave(argv: list[str]) -> int:
        import os
        import socket
        import time

        if how == "changed":
            Path("mine").write_text("other")
        elif how == "removed":
            Path("mine").unlink()
        elif how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "process" and os.fork() == 0:
            time.sleep(60)
        elif how == "network":
            socket.create_connection(("127.0.0.1", 1))
        return 0

    monkeypatch.setattr("pipeline.cli.main", misbehave)
    case = Case("command_line", ("train",), (Item("mine", "bytes", b"text"),))
    ended = sandbox.run_case(case, tmp_path, tmp_path)
    assert ended.outcome == {"signal": "code", "network": "traceback"}.get(how, "leftover"), ended


def test_the_material_is_accepted(tmp_path: Path) -> None:
    """A case refused for another reason than what was made hostile would show nothing."""
    base = tmp_path / "base"
    material.make(base)
    run = Item("run", "copy", b"run")
    for case in (
        Case("x", ("--dry-run", "search", "--run-dir", "new", *material.SETTINGS)),
        Case("x", ("--dry-run", "evaluate", "--run-dir", "run"), (run,)),
        Case("x", ("--dry-run", "report", "--run-dir", "run"), (run,)),
        Case("x", ("--dry-run", "export", "--run-dir", "run"), (run,)),
        Case("x", ("run",), (run,), "inputs"),
        Case("x", ("verify", "run"), (run,)),
    ):
        ended = sandbox.run_case(case, tmp_path, base)
        assert ended.outcome == "accepted", (case, ended)
