"""A process of Ray dies in the middle of a search: it is said at once, nothing is left, the same command continues."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from helpers.searches import end, ended, run, start, wait_for, write_config

from pipeline import EXIT_FAILED, EXIT_OK, EXIT_STOPPED

pytestmark = pytest.mark.slow
SAID_WITHIN = 45
"""Seconds: 30 on a machine that does nothing else. Ray by itself takes 60 (gcs_server) or 200 (raylet)."""


@pytest.mark.parametrize(("killed", "asked"), [("raylet", False), ("gcs_server", False), ("gcs_server", True)])
def test_a_search_ends_when_ray_dies(tmp_path: Path, killed: str, asked: bool) -> None:
    write_config(tmp_path)
    process = start(tmp_path, STUB_SECONDS="0.5")
    try:
        wait_for(tmp_path, "report", 1)
        scratch = Path((tmp_path / "search" / ".ray" / "scratch").read_text().strip())
        tree = psutil.Process(process.pid).children(recursive=True)
        next(one for one in tree if one.name() == killed).kill()
        if asked:
            os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=SAID_WITHIN)
    finally:
        end(process)
    assert process.returncode in ({EXIT_FAILED, EXIT_STOPPED} if asked else {EXIT_FAILED}), output
    assert "the same command continues" in output
    assert killed in output or process.returncode == EXIT_STOPPED
    assert "Traceback" not in output
    patience = time.monotonic() + 10
    while left := [one for one in tree if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < patience, f"left behind: {left}"
        time.sleep(0.1)
    assert not scratch.exists()
    assert not (tmp_path / "search" / ".ray").exists()

    before = ended(tmp_path)
    code, output = run(tmp_path)
    assert code == EXIT_OK, output
    assert before.items() <= ended(tmp_path).items()
    assert len(ended(tmp_path)) == 4
