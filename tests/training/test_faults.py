"""Faults of whole processes and commands: two dozen cases, and the real launcher.

More: `python tests/faults.py --cases 200 --seed 1`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT

from pipeline.config import dump_config, load_config
from pipeline.distributed import ranks
from pipeline.files import read_json, read_json_lines, write_text
from pipeline.run_folder.paths import RunPaths


@pytest.mark.slow
def test_sixteen_cases_lose_nothing() -> None:
    """Every one ends as the undisturbed run, or with a refusal that names what is damaged (`tests/faults.py`)."""
    command = [sys.executable, str(ROOT / "tests" / "faults.py"), "--cases", "16", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    found = {word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)\b", last.partition(":")[2])}
    assert last.startswith("16 cases: ") and found["same"] >= 8 and found.get("refused", 0) >= 1, last


COMMAND = """
import sys
from pathlib import Path
from pipeline.config import load_config
from pipeline.distributed.launcher import run_world_stage
folder = Path(sys.argv[1])
launch = load_config(folder / "config.yaml").launch
sys.exit(run_world_stage("train", ["pipeline.stages", "train"], folder, launch))
"""


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def living(folder: Path) -> list[int]:
    """Pids of the registered ranks."""
    files = ranks.ranks_folder(folder).glob("rank_*.json")
    return sorted(read_json(path)["pid"] for path in files)


@pytest.mark.slow
def test_a_killed_rank_and_then_a_killed_command(tmp_path: Path, tiny_settings: list[str]) -> None:
    """kill -9 of a rank: the other leaves, the cause is on top, the stage starts again from its newest checkpoint.

    kill -9 of the command: no rank is left.
    """
    folder, shown = tmp_path / "run", tmp_path / "shown"
    settings = [
        *tiny_settings, "train.max_steps=100000", "train.validate_every_steps=1000", "train.checkpoint_every_steps=5",
        "launch.processes=2", "launch.restarts=1", "launch.grace_seconds=2",
    ]
    write_text(RunPaths(folder).config, dump_config(load_config(None, settings)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    steps = lambda: [row["step"] for row in read_json_lines(RunPaths(folder).metrics) if row["kind"] == "train"]  # noqa: E731
    with shown.open("w") as file:
        command = subprocess.Popen([sys.executable, "-c", COMMAND, str(folder)], stderr=file, env=environment)
    try:
        until(lambda: len(steps()) > 12, 300, "the first steps")
        first = living(folder)
        victim = read_json(ranks.ranks_folder(folder) / "rank_1.json")["pid"]
        os.kill(victim, signal.SIGKILL)
        until(lambda: not any(map(ranks.alive, first)), 30, "the other rank leaves")
        until(lambda: len(living(folder)) == 2 and living(folder) != first, 300, "the second start")
        text = shown.read_text()
        assert f"train failed: rank 1 (pid {victim}) was killed from outside" in text
        assert "starting train again" in text
        until(lambda: "continuing from step_" in shown.read_text(), 300, "the second start goes on")
        second = living(folder)
        command.send_signal(signal.SIGKILL)
        command.wait()
        until(lambda: not any(map(ranks.alive, second)), 30, "no rank is left")
    finally:
        command.kill()
        command.wait()
