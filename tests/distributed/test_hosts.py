"""Hosts of a hostfile: how they are read, asked and told; ssh and pdsh are scripts here (tests/clusters has them)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import build_config
from pipeline.config.launch import LaunchConfig
from pipeline.distributed import hosts, remote
from pipeline.distributed.launcher import launcher_command, launcher_environment, world_processes
from pipeline.errors import ConfigError, SetupError
from pipeline.plan.preflight import check_inputs


def hostfile(folder: Path, text: str, **more: object) -> LaunchConfig:
    (folder / "hosts").write_text(text)
    return LaunchConfig(hostfile=str(folder / "hosts"), **more)  # type: ignore[arg-type]


def tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of that name, and beside it what scripts need: no pdsh and no ssh that this machine may have."""
    if not (folder / "bin").exists():
        (folder / "bin").mkdir()
        for needed in ("sh", "sed", "env", "sleep"):
            (folder / "bin" / needed).symlink_to(str(shutil.which(needed, path="/bin:/usr/bin")))
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))


ANSWERING = """
while [ "$1" = -o ]; do shift 2; done
host="$1"; shift
case "$host" in
  gone*) echo "connect to host $host port 22: No route to host" >&2; exit 255;;
  local*) export SSH_CONNECTION="127.0.0.1 5 127.0.0.1 22";;
  *) export SSH_CONNECTION="10.0.0.9 5 10.0.0.${host#node} 22";;
esac
exec sh -c "$*" """
"""An ssh whose hosts are this machine."""


def test_a_hostfile_is_read_line_by_line(tmp_path: Path) -> None:
    text = "# ours\n\nnode0 slots=2\n  user@10.0.0.7   slots=4   # big\n"
    launch = hostfile(tmp_path, text)
    assert hosts.read_hosts(launch) == {"node0": 2, "user@10.0.0.7": 4}
    assert world_processes(launch) == 6, "the slots, whatever this machine has"
    assert world_processes(hostfile(tmp_path, text, processes=3)) == 6
    assert "OMP_NUM_THREADS" not in launcher_environment(launch), "the cores of the hosts are theirs"
    for wrong, said in (
        ("node0\n", "hosts:1': must be a host"), ("a slots=1\na slots=2\n", "hosts:2': names a host again"),
        ("-oProxyCommand=x slots=1\n", "must be a host"), ("a slots=0", "must be a host"), ("# none\n", "no host"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            hosts.read_hosts(hostfile(tmp_path, wrong))
        with pytest.raises(ConfigError, match=said):
            check_inputs(build_config({"launch": {"hostfile": str(tmp_path / "hosts")}}))


def test_hosts_are_asked_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "ssh", ANSWERING, monkeypatch)
    launch = hostfile(tmp_path, "node4 slots=2\nnode5 slots=1\n", master_port=29400)
    command = launcher_command(["pipeline.stages", "train"], tmp_path, launch)
    world = json.dumps({"node4": [0, 1], "node5": [0]})
    assert command[1:4] == ["-m", "pipeline.distributed.hosts", world]
    assert command[4:] == ["10.0.0.4", "29400", str(tmp_path), "pipeline.stages", "train"]
    given = launch.model_copy(update={"master_addr": "10.1.1.1"})
    assert launcher_command(["x"], tmp_path, given)[4] == "10.1.1.1"
    with pytest.raises(SetupError, match=f"'node4': has no {tmp_path / 'runs'}"):
        launcher_command(["x"], tmp_path / "runs", launch)
    with pytest.raises(SetupError, match=r"'gone3': cannot be reached by ssh: .*No route to host"):
        launcher_command(["x"], tmp_path, hostfile(tmp_path, "node4 slots=2\ngone3 slots=1\n"))
    with pytest.raises(SetupError, match=r"'local': stands for 127.0.0.1 on this machine"):
        launcher_command(["x"], tmp_path, hostfile(tmp_path, "local slots=2\nnode5 slots=1\n"))
    assert launcher_command(["x"], tmp_path, hostfile(tmp_path, "local slots=2\n"))[4] == "127.0.0.1"


@pytest.mark.parametrize("pdsh", [False, True])
def test_every_host_is_told_its_number_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], pdsh: bool
) -> None:
    """The words come out of the remote shell as they went in, spaces, quotes and per cent included."""
    odd = str(tmp_path / "it's 100%n $HOME")
    tool(tmp_path, "ssh", 'for last; do :; done; sh -c "$last"; exit 3', monkeypatch)
    if pdsh:  # as the real one: %n and %% are its own
        tool(tmp_path, "pdsh", "for last; do :; done; for n in 0 1; do "
             'sh -c "$(printf %s "$last" | sed -e s/%%/@@/g -e s/%n/$n/g -e s/@@/%/g)"; done; exit 3', monkeypatch)
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]), flush=True)"
    (tmp_path / "python").write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -c {shlex.quote(show)} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SOMETHING", "LORADROP_PARENT_PID"):
        monkeypatch.setenv(name, str(os.getpid()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "a b")
    given = ['{"node0": [0], "node1": [0]}', "10.0.0.1", "29400", odd, "pipeline.stages", "train"]
    assert hosts.main(given) == 3
    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert sorted(words for words, _, _ in told) == [["0", *given], ["1", *given]]
    for _, environment, folder in told:
        assert environment["HF_HUB_OFFLINE"] == "a b" and folder == os.getcwd()
    command = hosts.remote_command("0", given, os.environ)
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SOMETHING", "LORADROP_PARENT_PID"):
        assert name not in command


@pytest.mark.parametrize("pdsh", [False, True])
def test_connections_end_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pdsh: bool) -> None:
    """It may be killed: what runs on the nodes then sees the end of its connection."""
    for name in ("ssh", *(["pdsh"] if pdsh else [])):
        tool(tmp_path, name, "exec sleep 60", monkeypatch)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv("LORADROP_PARENT_PID", str(gone.pid))
    begun = time.monotonic()
    assert hosts.main(['{"node0": [0], "node1": [0]}', "10.0.0.1", "29400", str(tmp_path), "x"]) == 247
    assert time.monotonic() - begun < 30


def test_a_node_starts_its_own_processes_and_says_which_were_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    class Launcher:
        def __init__(self, command: list[str], **_: object) -> None:
            seen.append(command)

        def wait(self) -> int:
            return -9

    recorded: list[Path] = []
    monkeypatch.setattr(remote.subprocess, "Popen", Launcher)
    monkeypatch.setattr(remote.ranks, "record_lost", recorded.append)
    monkeypatch.setattr(remote.signal, "pthread_sigmask", lambda *_: None)
    monkeypatch.setattr(remote, "_end_with_connection", lambda _: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("NODE_RANK", "")
    world = '{"node0": [0], "node1": [0, 1]}'
    assert remote.main(["1", world, "10.0.0.1", "29400", str(tmp_path), "pipeline.stages", "train"]) == 247
    assert (os.environ["NODE_RANK"], os.environ.pop("OMP_NUM_THREADS")) == ("1", "4")
    text = " ".join(seen[0])
    assert "--node_rank=1 --master_addr=10.0.0.1 --master_port=29400 --module pipeline.stages train" in text
    assert text.endswith(f"--run-dir {tmp_path}") and recorded == [tmp_path]
