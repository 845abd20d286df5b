"""A stop or a failure: which of them a stage ended with, in each order of events."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT

from pipeline.distributed import ranks
from pipeline.distributed.launcher import _exit_code, run_stage
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER
from pipeline.run_folder.paths import RunPaths, read_status, update_status
from tune.stopping import stop_on_signal

TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)


def ended(
    folder: Path, code: int, asked: list[int], state: str = "", failure: str = "", in_world: bool = True
) -> int:
    """The exit code of a stage that left this behind."""
    if state:
        update_status(RunPaths(folder), "train", state)
    if failure:
        exit_code = EXIT_USER if failure == "error" else EXIT_FAILED
        found = ranks.Failure.of_this_process(1, "crash", "the cause", exit_code)
        ranks.record_failure(folder, replace(found, kind=failure))  # type: ignore[arg-type]
    return _exit_code(code, asked, folder, "train", in_world, deque(), folder / "x.log")


@pytest.mark.parametrize(
    ("code", "asked", "state", "failure", "expected"),
    [
        (75, [TERM], "stopped", "", EXIT_STOPPED),
        (1, [TERM], "stopped", "", EXIT_STOPPED),  # the launcher, which was terminated meanwhile
        (75, [], "stopped", "", EXIT_STOPPED),  # a scheduler told the ranks themselves
        (75, [TERM], "stopped", "crash", EXIT_FAILED),
        (75, [], "stopped", "killed", EXIT_FAILED),
        (1, [TERM], "stopped", "error", EXIT_USER),
        (1, [TERM], "starting", "crash", EXIT_FAILED),
        (1, [TERM], "starting", "", EXIT_FAILED),  # a launcher that could not start anything
        (1, [], "starting", "", EXIT_FAILED),
        (0, [TERM], "done", "", EXIT_STOPPED),  # done, but nothing is to follow
        (0, [], "starting", "", EXIT_OK),
        (-9, [], "done", "", EXIT_OK),
        (-9, [INT, INT], "running", "", EXIT_STOPPED),  # by us
        (-9, [TERM], "running", "", EXIT_FAILED),
    ],
)
def test_several_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, asked: list[int], state: str, failure: str,
    expected: int,
) -> None:
    assert ended(tmp_path, code, asked, state, failure) == expected
    assert ("the cause" in capsys.readouterr().err) == bool(failure)
    if failure:
        assert read_status(RunPaths(tmp_path))["train"] == {"state": "failed", "detail": "the cause"}


@pytest.mark.parametrize(
    ("code", "asked", "expected"),
    [
        (75, [], EXIT_STOPPED), (75, [TERM], EXIT_STOPPED), (-15, [TERM], EXIT_STOPPED), (-9, [INT, INT], EXIT_STOPPED),
        (0, [TERM], EXIT_STOPPED), (0, [], EXIT_OK), (1, [TERM], EXIT_FAILED), (2, [TERM], EXIT_USER),
        (-11, [TERM], EXIT_FAILED), (-9, [], EXIT_FAILED),
    ],
)
def test_one_process(tmp_path: Path, code: int, asked: list[int], expected: int) -> None:
    """Of which an earlier start was stopped: that says nothing about this one."""
    assert ended(tmp_path, code, asked, "stopped", in_world=False) == expected


RANK = """
import os, signal, sys, time
from pathlib import Path
from pipeline.distributed import ranks
from pipeline.distributed.worker import stage_main
from pipeline.errors import DataError
folder, what = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])

def until(true):
    end = time.monotonic() + 20
    while not true() and time.monotonic() < end:
        time.sleep(0.01)

def work(run_dir):
    until(lambda: len(list(ranks.ranks_folder(run_dir).glob("rank_*.json"))) == 2)
    if rank == 1 and what == "raises":
        raise RuntimeError("boom")
    if rank == 1 and what == "user error":
        raise DataError("rows.jsonl", None, "is wrong")
    if rank == 1 and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and what == "peer stopped":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        until(lambda: ranks.stopped(run_dir))
        raise RuntimeError("connection closed by peer")
    if rank == 0 and what == "peer stopped":
        os.kill(os.getpid(), signal.SIGTERM)
    if rank == 0 and what == "asked":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)

sys.exit(stage_main("train", work, folder, in_world=True))
"""
LAUNCHER = """
import os, subprocess, sys, time
start = lambda rank: subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], *sys.argv[2:]], env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
)
processes = [start(rank) for rank in range(2)]
while not any(process.poll() for process in processes):  # as DeepSpeed's: the first that fails ends the others
    time.sleep(0.01)
code = next(process.poll() for process in processes if process.poll())
for process in processes:
    process.terminate()
    process.wait()
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "shown"),
    [
        ("raises", EXIT_FAILED, "train failed: RuntimeError: boom"), ("user error", EXIT_USER, "rows.jsonl: is wrong"),
        ("killed", EXIT_FAILED, "was killed from outside"), ("asked", EXIT_STOPPED, "train stopped"),
        ("peer stopped", EXIT_STOPPED, "train stopped"),
    ],
)
def test_a_rank_in_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: str, code: int, shown: str
) -> None:
    """The launcher terminates the other rank, which has nothing to save yet: that is no stop, unless the first was."""
    monkeypatch.setenv("LORADROP_GRACE_SECONDS", "3")
    for start in range(2):  # what the first has left behind does not count for the second
        command = [sys.executable, "-c", LAUNCHER, RANK, str(tmp_path), what]
        assert run_stage(command, tmp_path / "x.log", tmp_path, "train", in_world=True) == code, start
        assert shown in capfd.readouterr().err
        assert read_status(RunPaths(tmp_path))["train"]["state"] == ("stopped" if code == EXIT_STOPPED else "failed")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "export"])
def test_a_stage_that_cannot_be_loaded_has_failed_although_a_stop_is_asked_for(
    tmp_path: Path, stage: str
) -> None:
    """The signal comes while the reason is being printed."""
    code = f"""
import os, sys, time, traceback
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "pipeline.stages.{stage}":
            raise ImportError("a library is broken")
def say(*arguments, show=traceback.print_exc):
    show() if not arguments else traceback.print_exception(*arguments)
    os.kill(os.getppid(), 15)
    time.sleep(0.7)
sys.meta_path.insert(0, Broken())
sys.excepthook = traceback.print_exc = say
from pipeline.stages.__main__ import main
sys.exit(main(["{stage}", "--run-dir", {str(tmp_path)!r}]))
"""
    parent = f"""
import sys
from pathlib import Path
from pipeline.distributed.launcher import run_stage
folder = Path({str(tmp_path)!r})
stage = {stage!r}
sys.exit(run_stage([sys.executable, "-c", {code!r}], folder / "x.log", folder, stage, in_world=stage == "train"))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", parent], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_FAILED and "a library is broken" in done.stderr
    assert json.loads((tmp_path / "status.json").read_text())[stage]["state"] == "failed"


def test_a_search_whose_command_is_gone_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setenv("LORADROP_PARENT_PID", str(gone.pid))
    monkeypatch.setattr("tune.stopping._POLL_SECONDS", 0.01)
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stopping:
        deadline = time.monotonic() + 10
        while not stopping.requested:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) is before
