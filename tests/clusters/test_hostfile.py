"""DeepSpeed by hostfile over a real sshd, on two machines: the losses of one, and what becomes of killed processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clusters.machines import ENVIRONMENT, Machine, losses, need, wait_until
from clusters.ssh import ssh_network
from helpers import ROOT

from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_USER
from pipeline.support.tiny import write_tiny_data, write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
STEPS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostfile")


@pytest.fixture(scope="module")
def machines(folder: Path) -> Iterator[list[Machine]]:
    with ssh_network(folder / "network", ["node0", "node1"]) as (_, started):
        (folder / "hosts").write_text("node0 slots=1\nnode1 slots=1  # another machine\n")
        yield started


@pytest.fixture(scope="module")
def command(folder: Path, machines: list[Machine]) -> list[str]:
    write_tiny_model(folder / "model")
    write_tiny_data(folder / "rows.jsonl", 300)
    return [
        sys.executable, "-m", "pipeline.cli", "train", f"model.path={folder / 'model'}", "model.compute_dtype=float32",
        f"data.path={folder / 'rows.jsonl'}", "data.train_rows=64", "data.validation_rows=20",
        "data.calibration_rows=8", "data.test_rows=8", "data.max_tokens=64", f"train.max_steps={STEPS}",
        "train.global_batch=8", "train.micro_batch=4", "train.learning_rate=0.01", "train.validate_every_steps=16",
        "train.checkpoint_every_steps=2", "adapter.rank=4", "launch.grace_seconds=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one(folder: Path, command: list[str]) -> list[float]:
    """The losses of two processes of this machine."""
    words = [*command, "--run-dir", str(folder / "one"), "launch.processes=2"]
    subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True)
    found = losses(folder / "one")
    assert len(found) == STEPS
    return found


def without_pdsh(folder: Path) -> str:
    """A PATH with ssh and without pdsh."""
    bare = folder / "bin"
    if not bare.exists():
        bare.mkdir()
        (bare / "ssh").symlink_to(str(shutil.which("ssh")))
    return str(bare)


def start(machine: Machine, command: list[str], run: Path, path: str) -> subprocess.Popen[str]:
    words = machine.words(*command, "--run-dir", str(run), f"launch.hostfile={run.parent / 'hosts'}", PATH=path)
    return subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks(machine: Machine) -> list[psutil.Process]:
    return [one for one in machine.processes() if "--local_rank=0" in cmdline(one)]


def left(machine: Machine) -> list[list[str]]:
    """Of what trains, or waits for it."""
    return [said for one in machine.processes() if "pipeline.stages" in (said := cmdline(one))]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize("tool", ["pdsh", "ssh"])
def test_two_nodes_train_what_one_machine_trains(
    folder: Path, machines: list[Machine], command: list[str], one: list[float], tool: str
) -> None:
    """To the bit: the same two processes, by gloo over a cable instead of the loopback interface."""
    if tool == "pdsh":
        need("pdsh", of="pdsh")
    path = os.environ["PATH"] if tool == "pdsh" else without_pdsh(folder)
    process = start(machines[0], command, folder / tool, path)
    seen = {name: wait_until(f"ranks on {name}", lambda m=m: ranks(m)) for name, m in zip("01", machines, strict=True)}
    connected = [cmdline(process)[0] for process in machines[0].processes() if cmdline(process)]
    output, _ = process.communicate(timeout=900)
    assert process.returncode == EXIT_OK, output
    assert ("pdsh" in connected) == (tool == "pdsh"), connected
    assert len(seen["0"]) == len(seen["1"]) == 1
    assert losses(folder / tool) == one
    assert "socket.cpp" not in output and "Traceback" not in output and "Fatal" not in output
    assert not left(machines[0]) and not left(machines[1])


def test_a_killed_command_and_a_killed_rank_leave_nothing_and_the_same_command_continues(
    folder: Path, machines: list[Machine], command: list[str], one: list[float]
) -> None:
    run, path = folder / "killed", without_pdsh(folder)
    here, there = machines

    process = start(here, command, run, path)
    wait_until("steps", lambda: len(losses(run)) > 2)
    inside = next(found for found in here.processes() if "pipeline.cli" in cmdline(found) and found.pid != process.pid)
    inside.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    wait_until("all ranks to leave", lambda: not left(here) and not left(there), 300)
    done = len(losses(run))
    assert done < STEPS

    process = start(here, command, run, path)
    wait_until("further steps", lambda: len(losses(run)) > done + 2)
    ranks(there)[0].kill()
    output, _ = process.communicate(timeout=900)
    print(output)
    assert process.returncode == EXIT_FAILED, output
    assert "rank 1 (pid" in output and "was killed from outside" in output, output
    assert not left(here) and not left(there)

    process = start(here, command, run, path)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == EXIT_OK, output
    assert losses(run) == one, "what was begun three times is what one machine trains at once"


def test_a_host_that_does_not_answer_is_said_at_once(folder: Path, machines: list[Machine], command: list[str]) -> None:
    (folder / "nobody").write_text("node0 slots=1\nnode7 slots=1\n")
    words = machines[0].words(*command, "--run-dir", str(folder / "alone"), f"launch.hostfile={folder / 'nobody'}")
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == EXIT_USER and "launch.hostfile = 'node7': cannot be reached by ssh" in done.stderr
    assert "Traceback" not in done.stderr
