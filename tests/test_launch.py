"""Processes of a stage: their log, their exit code, and what a signal does to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.sections import LaunchConfig
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED
from pipeline.launch import process_count, run_stage, training_command, training_environment
from pipeline.runs import RunPaths

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_count_is_passed_only_where_it_is_set_or_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.launch.has_accelerator", lambda: True)
    assert "--num_accelerators" not in training_command(tmp_path, LaunchConfig())
    assert training_environment(LaunchConfig()) == {}
    command = training_command(tmp_path, LaunchConfig(processes=4, hostfile="hosts", master_port=1234))
    assert " ".join(command).endswith(
        f"--master_port 1234 --hostfile hosts --num_accelerators 4 --module pipeline.train --run-dir {tmp_path}"
    )
    monkeypatch.setattr("pipeline.launch.has_accelerator", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert process_count(LaunchConfig()) == 2
    assert training_environment(LaunchConfig()) == {"OMP_NUM_THREADS": "4"}


def test_the_log_has_everything_and_the_user_sees_what_matters(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "print('[2026-01-01 00:00:00,000] [INFO] chatter'); print('step 1/2 · loss 3'); print('result')"
    assert run_stage(python(code), tmp_path / "logs" / "x.log", tmp_path, "evaluate") == 0
    shown, log = capfd.readouterr().err, (tmp_path / "logs" / "x.log").read_text()
    assert "chatter" in log and "chatter" not in shown
    assert "step 1/2" in shown and "result" in shown


def test_a_failure_shows_the_end_of_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('[2026-01-01] the cause'); sys.exit(9)"
    assert run_stage(python(code), tmp_path / "x.log", tmp_path, "train") == EXIT_FAILED
    shown = capfd.readouterr().err
    assert "exit code 9" in shown and "the cause" in shown


def test_a_stage_that_recorded_a_stop_ends_with_its_code(tmp_path: Path) -> None:
    code = f"import json; open({str(RunPaths(tmp_path).status)!r}, 'w').write(json.dumps({{'train': {{'state': 'stopped'}}}}))"
    assert run_stage(python(f"{code}\nraise SystemExit(1)"), tmp_path / "x.log", tmp_path, "train") == EXIT_STOPPED


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_signal_becomes_a_request_or_an_end(tmp_path: Path, stage: str) -> None:
    request = RunPaths(tmp_path).stop_request
    child = f"import os, time\nprint('ready', flush=True)\nwhile not os.path.exists({str(request)!r}): time.sleep(0.02)\nraise SystemExit(75)"
    parent = (
        "import sys; from pathlib import Path; from pipeline.launch import run_stage\n"
        f"sys.exit(run_stage([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'x.log')!r}), Path({str(tmp_path)!r}), {stage!r}))"
    )
    process = subprocess.Popen(
        python(parent), stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and "ready" not in (
        (tmp_path / "x.log").read_text() if (tmp_path / "x.log").exists() else ""
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == EXIT_STOPPED
    if stage == "train":
        assert json.loads(request.read_text()) == {"signal": "SIGTERM"}
    else:
        assert not request.exists()
