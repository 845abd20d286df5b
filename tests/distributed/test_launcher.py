"""Processes of a stage: their log, their exit code, and what a signal does to them."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from pipeline.config.launch import LaunchConfig
from pipeline.distributed.launcher import launcher_command, launcher_environment, process_count, run_stage
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, RunFolderError
from pipeline.run_folder.paths import RunPaths


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_count_is_passed_only_where_it_is_set_or_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.distributed.launcher.has_accelerator", lambda: True)
    assert "--num_accelerators" not in launcher_command(["pipeline.stages", "train"], tmp_path, LaunchConfig())
    told = {"LORADROP_WARNING_SIGNAL": "SIGUSR1", "LORADROP_GRACE_SECONDS": "10.0"}
    assert launcher_environment(LaunchConfig()) == told
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setattr("pipeline.distributed.launcher.check_processes", lambda processes: None)
    command = launcher_command(["pipeline.stages", "train"], tmp_path, LaunchConfig(processes=2))
    assert "--include localhost:4,5" in " ".join(command) and "--num_accelerators" not in command
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    command = launcher_command(["pipeline.stages", "train"], tmp_path, LaunchConfig(processes=4, master_port=1234))
    assert " ".join(command).endswith(
        "--master_port 1234 --hostfile /dev/null/none --num_accelerators 4"
        f" --module pipeline.stages train --run-dir {tmp_path}"
    )
    monkeypatch.setattr("pipeline.distributed.launcher.has_accelerator", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert process_count(LaunchConfig()) == 2
    command = launcher_command(["pipeline.stages", "train"], tmp_path, LaunchConfig(processes=3))
    assert "deepspeed.launcher.launch" in command and command[-5:-2] == ["--module", "pipeline.stages", "train"]
    coded = next(word for word in command if word.startswith("--world_info=")).partition("=")[2]
    assert json.loads(base64.urlsafe_b64decode(coded)) == {"localhost": [0, 1, 2]}
    assert launcher_environment(LaunchConfig()) == {**told, "OMP_NUM_THREADS": "4"}


def test_the_log_has_everything_and_the_user_sees_what_matters(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "print('[2026-01-01 00:00:00,000] [INFO] chatter'); print('step 1/2 · loss 3'); print('result')"
    assert run_stage(python(code), tmp_path / "logs" / "x.log", tmp_path, "evaluate", in_world=True) == 0
    shown, log = capfd.readouterr().err, (tmp_path / "logs" / "x.log").read_text()
    assert "chatter" in log and "chatter" not in shown
    assert "step 1/2" in shown and "result" in shown


def test_a_stage_does_not_inherit_another_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "26120")
    code = "import os; raise SystemExit(3 if {'RANK', 'MASTER_PORT'} & set(os.environ) else 0)"
    assert run_stage(python(code), tmp_path / "x.log", tmp_path, "export") == 0


def test_a_failure_shows_the_end_of_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('[2026-01-01] the cause'); sys.exit(9)"
    assert run_stage(python(code), tmp_path / "x.log", tmp_path, "train", in_world=True) == EXIT_FAILED
    shown = capfd.readouterr().err
    assert "exit code 9" in shown and "the cause" in shown


def test_a_stage_that_recorded_a_stop_ends_with_its_code(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.run_folder.paths import RunPaths, update_status;"
        f"update_status(RunPaths(Path({str(tmp_path)!r})), 'train', 'stopped'); sys.exit(1)"
    )
    assert run_stage(python(code), tmp_path / "x.log", tmp_path, "train", in_world=True) == EXIT_STOPPED
    code = run_stage(python("raise SystemExit(1)"), tmp_path / "x.log", tmp_path, "train", in_world=True)
    assert code == EXIT_FAILED


CHILD = """
import os, time
print("ready", flush=True)
while not os.path.exists({request!r}):
    time.sleep(0.02)
raise SystemExit(75)
"""
PARENT = """
import sys
from pathlib import Path
from pipeline.distributed.launcher import run_stage
folder = Path({folder!r})
stage = {stage!r}
command = [sys.executable, "-c", {child!r}]
sys.exit(run_stage(command, folder / "x.log", folder, stage, in_world=stage != "export"))
"""


@pytest.mark.parametrize("stage", ["train", "evaluate", "export"])
def test_a_signal_becomes_a_request_or_an_end(tmp_path: Path, stage: str) -> None:
    request, log = RunPaths(tmp_path).stop_request, tmp_path / "x.log"
    parent = PARENT.format(folder=str(tmp_path), child=CHILD.format(request=str(request)), stage=stage)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(python(parent), stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (log.exists() and "\nready\n" in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == EXIT_STOPPED
    if stage != "export":
        assert json.loads(request.read_text()) == {"signal": "SIGTERM"}
    else:
        assert not request.exists()


@pytest.mark.parametrize("name", ["logs", "logs/ranks", "logs/report.log"])
def test_nothing_is_written_through_links(tmp_path: Path, name: str) -> None:
    """A run folder may come from elsewhere: whoever made it does not choose what is appended to."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    if name.endswith(".log"):
        outside.write_text("mine")
    else:
        outside.mkdir()
    (run / name).symlink_to(outside)
    with pytest.raises(RunFolderError, match="symbolic link to"):
        run_stage(python("print('theirs')"), run / "logs" / "report.log", run, "report")
    assert outside.read_text() == "mine" if outside.is_file() else not list(outside.iterdir())


def test_a_child_writes_no_control_characters_and_a_command_no_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "x.log"
    command = [*python("print('a\\x1b]0;title\\x07b')"), "first\nssh-ed25519 AAAA"]
    assert run_stage(command, log, tmp_path, "export") == 0
    shown, written = capfd.readouterr().err, log.read_text()
    assert "a\\x1b]0;title\\x07b" in shown and "a\\x1b]0;title\\x07b" in written
    assert "\x1b" not in shown + written and "\x07" not in shown + written
    assert not [line for line in written.splitlines() if line.startswith("ssh-ed25519")]
