"""What ties a process to its parent and its peers: small processes without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT

from pipeline.distributed import ranks
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, RunFolderError
from pipeline.files import write_json
from pipeline.run_folder.paths import RunPaths, read_status

RANK = """
import sys, threading
from pathlib import Path
from pipeline.distributed import lifeline
folder = Path(sys.argv[1])
with lifeline.lifeline("train", folder, in_world=True) as line:
    if "peers" in sys.argv:
        line.watch_peers()
    if "works" in sys.argv:
        line.work_begins()
    print("ready", flush=True)
    if "stuck" in sys.argv:
        lock = threading.Lock(); lock.acquire(); lock.acquire()  # a collective that never ends: no handler runs
    import time
    end = time.monotonic() + 20
    while time.monotonic() < end and not ("works" in sys.argv and line.stop_asked()):
        time.sleep(0.02)
    print("noted", flush=True)
"""


def rank(folder: Path, number: int, *words: str, **environment: str) -> subprocess.Popen[str]:
    """A process that is registered and watches."""
    told = {"PYTHONPATH": str(ROOT), "RANK": str(number), "LORADROP_GRACE_SECONDS": "0.5", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(folder), *words], env={**os.environ, **told}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_before_the_work_a_stop_ends_at_once_and_later_it_is_noted(tmp_path: Path) -> None:
    early, asked = rank(tmp_path / "a", 0), rank(tmp_path / "b", 0)
    working = [rank(tmp_path / "c", n, "works") for n in range(2)]
    early.send_signal(signal.SIGTERM)
    write_json(RunPaths(tmp_path / "b").stop_request, {})
    working[0].send_signal(signal.SIGINT)
    working[1].send_signal(signal.SIGUSR1)
    assert [early.wait(10), asked.wait(10)] == [EXIT_STOPPED] * 2
    assert read_status(RunPaths(tmp_path / "a"))["train"]["state"] == "stopped"
    assert [process.communicate(timeout=10)[0] for process in working] == ["noted\n"] * 2
    assert [process.returncode for process in working] == [0, 0]
    assert not list(ranks.ranks_folder(tmp_path / "c").iterdir())  # left in order


def test_a_stuck_process_leaves_when_a_peer_is_killed_and_the_peer_is_named_first(tmp_path: Path) -> None:
    victim, stuck = rank(tmp_path, 1), rank(tmp_path, 0, "works", "peers", "stuck")
    victim.kill()
    started = time.monotonic()
    assert stuck.wait(15) == EXIT_FAILED  # the victim is a zombie still: nobody has waited for it
    assert time.monotonic() - started > 0.5
    victim.wait()
    first, second = ranks.failures(tmp_path)
    assert (first.rank, first.kind, first.pid) == (1, "killed", victim.pid)
    assert second.rank == 0 and "left because rank 1 has failed" in second.message
    earlier = replace(second, rank=2, time=first.time - 1.0)  # a consequence may be written down sooner
    ranks.record_failure(tmp_path, earlier)
    assert [failure.rank for failure in ranks.failures(tmp_path)] == [1, 2, 0]
    ranks.clear(tmp_path)
    assert not ranks.failures(tmp_path)


def test_a_process_leaves_when_the_command_is_gone(tmp_path: Path) -> None:
    command = subprocess.Popen(["sleep", "60"])
    process = rank(tmp_path, 0, "works", "stuck", LORADROP_PARENT_PID=str(command.pid))
    command.kill()
    assert process.wait(15) == EXIT_FAILED
    command.wait()
    assert "the process that started this one is gone" in ranks.failures(tmp_path)[0].message


def test_an_earlier_failure_does_not_count_and_a_folder_in_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ranks.Failure.of_this_process(5, "crash", "long ago", EXIT_FAILED)
    ranks.record_failure(tmp_path, replace(old, host="faraway", time=time.time() - 3600))
    process = rank(tmp_path, 0, "works", "peers", LORADROP_GRACE_SECONDS="0")
    monkeypatch.setenv("NODE_RANK", "1")
    ranks.clear(tmp_path)  # another node on the same machine has ranks of its own
    monkeypatch.delenv("NODE_RANK")
    try:
        with pytest.raises(RunFolderError, match=f"is in use by process {process.pid}"):
            ranks.clear(tmp_path)
        with pytest.raises(RunFolderError, match="is in use"):
            ranks.register(tmp_path, 0)
        time.sleep(0.7)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert [entry.pid for entry in ranks.lost(tmp_path)] == [process.pid]
    ranks.clear(tmp_path)
    assert not ranks.lost(tmp_path)


def test_a_signal_between_two_stages_has_the_documented_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import cli

    monkeypatch.setattr(cli, "execute", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["report", "--run-dir", str(tmp_path)]) == EXIT_STOPPED
    assert signal.getsignal(signal.SIGTERM) is before
