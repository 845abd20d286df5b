"""Several nodes that start their own processes: who they are, what is refused, and two of them at work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.listeners import watch

from pipeline.config import RunConfig, build_config
from pipeline.config.launch import LaunchConfig
from pipeline.distributed.launcher import launcher_command
from pipeline.distributed.nodes import check_nodes, log_name, node_rank
from pipeline.errors import ConfigError, SetupError
from pipeline.stages.table import STAGES

TWO = LaunchConfig(nodes=2, processes=1, master_addr="10.77.0.1", master_port=29321)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"nodes": 2}, "needs launch.processes, launch.master_addr, launch.master_port"),
        ({"nodes": 2, "processes": 1, "master_addr": "a"}, "needs launch.master_port"),
        ({"nodes": 2, "processes": 1, "master_addr": "a", "master_port": 5, "hostfile": "h"}, "set one"),
    ],
)
def test_half_a_description_of_nodes_is_refused(values: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        build_config({"launch": values})


def test_the_node_rank_comes_from_the_environment() -> None:
    assert node_rank(LaunchConfig(), {"NODE_RANK": "7"}) == 0
    assert node_rank(TWO, {"SLURM_NODEID": "1"}) == 1
    assert node_rank(TWO, {"NODE_RANK": "0", "SLURM_NODEID": "1"}) == 0
    with pytest.raises(SetupError, match="NODE_RANK=0 to 1"):
        node_rank(TWO, {})
    for wrong in ("2", "-1", "first"):
        with pytest.raises(SetupError, match="from 0 to 1"):
            node_rank(TWO, {"NODE_RANK": wrong})


def test_stages_of_one_process_are_not_for_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    for name in ("run", "search", "compare"):
        with pytest.raises(ConfigError, match=f"is for train and evaluate, not for {name}"):
            check_nodes(TWO, name, STAGES[name].processes, ["train", "evaluate"])
    for name in ("train", "evaluate", "report", "export"):
        check_nodes(TWO, name, STAGES[name].processes, [])
    assert log_name("train", TWO) == "train.node1.log"


def test_the_command_of_the_launcher_without_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    command = " ".join(launcher_command(["pipeline.stages", "train"], tmp_path, TWO))
    hostfile = tmp_path / "logs" / "hostfile.2x1"
    assert hostfile.read_text() == "node0 slots=1\nnode1 slots=1\n"
    assert f"--hostfile {hostfile} --no_ssh --node_rank 1 --master_addr 10.77.0.1 --module" in command
    assert "--master_port 29321" in command and "--num_accelerators" not in command


def test_a_run_continues_on_other_nodes_and_stages_but_not_as_another_run() -> None:
    one = RunConfig()
    other = build_config({"launch": TWO.model_dump(), "train": {"deepspeed": "zero1", "micro_batch": 4}})
    assert one.sha256() != other.sha256() and one.result_sha256() == other.result_sha256()
    assert build_config({"train": {"seed": 1}}).result_sha256() != one.result_sha256()


def losses(run_dir: Path) -> list[float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_two_nodes_train_what_two_processes_of_one_node_train(
    tmp_path: Path, tiny_settings: list[str], two_namespaces: tuple[str, str]
) -> None:
    """Each namespace sees only its own end of the cable: the two nodes have nothing in common but the folder."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = [*tiny_settings, "train.max_steps=3"]
    command = [sys.executable, "-m", "pipeline.cli", "train", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--run-dir", str(one), "launch.processes=2"], cwd=ROOT, env=env, check=True)
    shared = ["launch.nodes=2", "launch.processes=1", "launch.master_addr=10.77.0.1", "launch.master_port=29321"]
    nodes = [["ip", "netns", "exec", name, *command, "--run-dir", str(two), *shared] for name in two_namespaces]
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(watch, node, 300, cwd=ROOT, env={**env, "NODE_RANK": str(number)})
            for number, node in enumerate(nodes)
        ]
    watched = [one.result() for one in started]
    assert [one.code for one in watched] == [0, 0], watched[0].output + watched[1].output
    for number, node in enumerate(watched, start=1):
        assert node.outside == {("python", f"10.77.0.{number}")}, "not the address given alone"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len(losses(one)) == 3  # seen 1.5e-7 apart
    assert (two / "logs" / "train.node1.log").exists()
