"""Searches of tests: the command with a training that takes milliseconds, and what its ledger says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from helpers import ROOT
from helpers.tune_stub import write_data
from tune.ledger import Ledger

PATIENCE_SECONDS = 400

SPACE = """
adapter.rate: {uniform: [0.1, 0.6]}
adapter.rank: {choice: [8, 16]}
train.learning_rate: {loguniform: [2e-4, 2e-3]}
"""


def write_config(folder: Path, space: str = SPACE, **search: Any) -> None:
    write_data(folder / "rows.jsonl")
    (folder / "space.yaml").write_text(space, encoding="utf-8")
    alone = {"plain": False, "pack": "off"}
    settings = {
        "data": {"path": "rows.jsonl", "validation_rows": 16, "calibration_rows": 8, "test_rows": 8},  # relative
        "train": {"validate_every_steps": 2},
        "search": {"space": "space.yaml", "trials": 4, "max_steps": 8, "adapters": 2, **alone, **search},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def stub_command() -> list[str]:
    """A search in the working folder, as `write_config` describes it."""
    return [sys.executable, str(ROOT / "tests" / "helpers" / "tune_stub.py"), "config.yaml", "search"]


def stub_environment(**more: str) -> dict[str, str]:
    """What `stub_command` needs, and the stub's settings."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "helpers")))
    return {**os.environ, "PYTHONPATH": path, **more}


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        stub_command(), cwd=folder, env=stub_environment(**environment),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """Leave nothing of a search, whatever has become of it."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # Ray's processes are of its group


def run(folder: Path, **environment: str) -> tuple[int, str]:
    process = start(folder, **environment)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, output


def wait_for(folder: Path, event: str, count: int) -> None:
    """Until the ledger holds `count` such events."""
    ledger, patience = folder / "search" / "ledger.jsonl", time.monotonic() + PATIENCE_SECONDS
    while not ledger.exists() or ledger.read_text().count(f'"event": "{event}"') < count:
        assert time.monotonic() < patience, f"no {count} events {event}"
        time.sleep(0.05)


def starts(folder: Path) -> list[tuple[str, str, str]]:
    lines = (folder / "search" / "ledger.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["trial"], json.dumps(e["values"]), e["config_sha256"]) for e in events if e["event"] == "start"]


def ended(folder: Path) -> dict[str, str]:
    """Trials that have ended, with their settings."""
    return {r.name: json.dumps(r.values) for r in Ledger(folder / "search" / "ledger.jsonl").in_order() if r.ended}
