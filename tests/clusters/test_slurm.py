"""docs/slurm.sh under a real SLURM of two machines: srun starts every node's command; the losses of one machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters.machines import ENVIRONMENT, Machine, losses, need, network, wait_until
from helpers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
CONFIGURATION = """
ClusterName=two
SlurmctldHost=node0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
NodeName=node[0-1] CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
LAUNCH = """exec "{python}" -m pipeline.cli "$@"
"""
"""In the place of the checkout's launch.sh, which would make .venv first."""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Machine]:
    """The first of two nodes, where jobs are submitted."""
    need("slurmctld", "slurmd", "srun", "sbatch", of="slurm-wlm")
    need("munged", of="munge")
    with network(tmp_path / "network", ["node0", "node1"]) as made, contextlib.ExitStack() as stack:
        folder = made.folder
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, cpus=os.cpu_count()))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "state").mkdir()
        words = {name: f"--{name}-file={folder / f'munged.{name}'}" for name in ("pid", "seed", "log")}
        key, socket = f"--key-file={folder / 'munge.key'}", f"--socket={folder / 'munge.socket'}"
        munged = ["/usr/sbin/munged", "--foreground", "--force", key, socket, *words.values()]
        stack.enter_context(served(munged, folder))
        machines = [made.start(name) for name in ("node0", "node1")]
        conf = str(folder / "slurm.conf")
        stack.enter_context(served(machines[0].words("/usr/sbin/slurmctld", "-D", "-f", conf), folder))
        for machine in machines:
            (folder / f"spool.{machine.name}").mkdir()
            stack.enter_context(served(machine.words("/usr/sbin/slurmd", "-D", "-f", conf), folder))
        wait_until("two idle nodes", lambda: idle(machines[0], conf) == 2)
        yield machines[0]


def idle(machine: Machine, conf: str) -> int:
    words = machine.words("sinfo", "-h", "-N", "-o", "%T", SLURM_CONF=conf)
    asked = subprocess.run(words, capture_output=True, text=True)
    return asked.stdout.split().count("idle")


@contextlib.contextmanager
def served(command: list[str], folder: Path) -> Iterator[None]:
    """A server, until the block ends."""
    with (folder / "servers.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_job_of_two_nodes_trains_what_one_machine_trains(
    tmp_path: Path, head: Machine, tiny_settings: list[str]
) -> None:
    words = [*tiny_settings, "model.compute_dtype=float32"]
    work, network_folder = tmp_path / "work", tmp_path / "network"
    work.mkdir()
    (work / "launch.sh").write_text(LAUNCH.format(python=sys.executable))
    conf = {"SLURM_CONF": str(network_folder / "slurm.conf"), "PROCESSES": "1"}
    submit = ["sbatch", "--wait", "--nodes=2", "--gpus-per-node=0", f"--output={work / 'job.out'}"]
    submit += [str(ROOT / "docs" / "slurm.sh"), "train", "--run-dir", str(work / "run"), *words]
    done = subprocess.run(
        head.words(*submit, folder=work, **conf), env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )
    said = (work / "job.out").read_text() if (work / "job.out").exists() else ""
    servers = (network_folder / "servers.log").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{said}{servers[-3000:]}"
    assert (work / "run" / "logs" / "train.node1.log").exists(), "one node worked alone"
    one = [sys.executable, "-m", "pipeline.cli", "train", "--run-dir", str(tmp_path / "one"), *words]
    subprocess.run([*one, "launch.processes=2"], env=ENVIRONMENT, cwd=ROOT, check=True)
    assert losses(work / "run") == losses(tmp_path / "one") and len(losses(work / "run")) == 6
