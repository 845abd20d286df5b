"""A search attached to a Ray cluster of several machines, which asks for a token: machines go and come meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from clusters.machines import ENVIRONMENT, Machine, Network, losses, network, wait_until
from helpers.searches import stub_command, stub_environment, write_config
from helpers.tune_stub import log_probs, scored

from pipeline.config import dump_config, load_config
from pipeline.data.splits import load_splits
from pipeline.errors import EXIT_OK
from pipeline.support.tiny import write_tiny_data, write_tiny_model
from tune.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
HEAD = "10.78.0.1:6379"
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5e" * 32}
TRIALS, STEPS = 12, 8
PATIENCE_SECONDS = 1800
"""Ray starts a dozen processes a machine, and all of them are on this one."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, Machine]]:
    """A head, which trains nothing, and the network for more."""
    names = ["head", *(f"worker{number}" for number in range(1, 6))]
    with network(tmp_path_factory.mktemp("ray") / "network", names) as made:
        head = made.start("head")
        with ray_node(made, head, "--head", "--port=6379", "--include-dashboard=false", "--num-cpus=0"):
            yield made, head


@contextmanager
def ray_node(made: Network, machine: Machine, *words: str, **environment: str) -> Iterator[None]:
    """A node of Ray on a machine, until the block ends or the machine does."""
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--block", "--disable-usage-stats", f"--node-ip-address={machine.address}", *words]
    env = {**stub_environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"), **TOKEN, **environment}
    log = made.folder / f"ray.{machine.name}.log"
    log.write_text("")
    processes: list[subprocess.Popen[bytes]] = []

    def runs() -> bool:
        if not processes or processes[-1].poll() is not None:  # it gives itself half a minute, a busy machine or not
            with log.open("a") as file:
                options = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL}
                processes.append(subprocess.Popen(machine.words(*start), env=env, **options))
        return "Ray runtime started" in log.read_text()

    try:
        wait_until(f"Ray on {machine.name}", runs, PATIENCE_SECONDS)
        yield
    finally:
        machine.end()
        for process in processes:
            process.wait(60)


@contextmanager
def worker(made: Network, name: str, cpus: int, **environment: str) -> Iterator[Machine]:
    """A machine that joins the cluster."""
    machine = made.start(name)
    size = str(100 * 2**20)
    joins = (f"--address={HEAD}", f"--num-cpus={cpus}", f"--object-store-memory={size}")
    with ray_node(made, machine, *joins, **environment):
        yield machine


def places(search: Path) -> dict[str, list[tuple[int, str]]]:
    """Trial -> (step, machine) of every step that was taken of it."""
    return {
        path.parent.name: [(int(step), host) for step, _, host in map(str.split, path.read_text().splitlines())]
        for path in sorted((search / "trials").glob("*/steps.txt"))
    }


def done(search: Path) -> set[str]:
    if not (search / "ledger.jsonl").exists():
        return set()
    return {record.name for record in Ledger(search / "ledger.jsonl").in_order() if record.state == "done"}


def starts(search: Path) -> list[str]:
    events = map(json.loads, (search / "ledger.jsonl").read_text().rpartition("\n")[0].splitlines())
    return [event["trial"] for event in events if event["event"] == "start"]


def test_trials_of_a_lost_machine_end_elsewhere_and_a_new_one_takes_its_share(
    tmp_path: Path, cluster: tuple[Network, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed, as a search is by itself: a worker per machine, two runs in each; a step takes a second."""
    made, head = cluster
    write_config(tmp_path, f"adapter.rate: {{grid: {[round(0.05 * k, 2) for k in range(1, TRIALS + 1)]}}}",
                 trials=TRIALS, adapters=TRIALS, pack=2, max_steps=STEPS)
    search, slowly = tmp_path / "search", {"STUB_SECONDS": "1"}
    with worker(made, "worker1", 4, **slowly) as lost, worker(made, "worker2", 4, **slowly):
        command = head.words(*stub_command(), folder=tmp_path)
        env = {**stub_environment(), **TOKEN, "RAY_ADDRESS": HEAD}
        attached = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            wait_until("a trial to end", lambda: attached.poll() is not None or done(search), PATIENCE_SECONDS)
            wait_until("a run of the machine that goes", lambda: unfinished(search, "worker1"), PATIENCE_SECONDS)
            before, begun = done(search), starts(search)
            lost.end()
            caught = unfinished(search, "worker1")
            assert caught, "nothing was going on there"
            with worker(made, "worker3", 4, **slowly):
                output, _ = attached.communicate(timeout=PATIENCE_SECONDS)
        finally:
            attached.kill()
    print(output)
    assert attached.returncode == EXIT_OK, output
    assert "packed on 2 bases, 4 threads" in output and "Traceback" not in output
    assert done(search) == {f"trial_{index:03d}" for index in range(TRIALS)}
    for name in caught:
        machines = [machine for _, machine in places(search)[name]]
        assert machines[-1] != "worker1" and STEPS in [step for step, _ in places(search)[name]], machines
    assert not before & set(starts(search)[len(begun):]), "a finished trial was begun again"
    for taken in places(search).values():
        steps, went_on = [step for step, _ in taken], {machine for _, machine in taken} - {"worker1"}
        assert sorted(set(steps)) == [*range(1, STEPS + 1)]
        assert len(steps) == STEPS or (taken[0][1] == "worker1" and went_on), "what went well was done twice"
        assert len(steps) <= STEPS + 2, "more was lost than since a checkpoint"
    assert "worker3" in {machine for taken in places(search).values() for _, machine in taken}, "the new one was idle"
    monkeypatch.chdir(tmp_path)  # where the search stood
    scores_are_those_of_one_machine(search)


def unfinished(search: Path, machine: str) -> set[str]:
    """Trials that are in the middle on a machine."""
    return {name for name, taken in places(search).items() if taken[-1][1] == machine and 2 < taken[-1][0] < STEPS}


def scores_are_those_of_one_machine(search: Path) -> None:
    """The stand-in's training is a function of the configuration: computed here it gives the same numbers."""
    for record in Ledger(search / "ledger.jsonl").in_order():
        config = load_config(search / "trials" / record.name / "config.yaml")
        labels = [row.label for row in load_splits(config.data).validation]
        expected = scored(log_probs(config, STEPS, np.array(labels)), np.array(labels))
        assert (record.nll, record.accuracy) == (expected["nll"], expected["accuracy"])
        assert [report["step"] for report in record.reports] == [2, 4, 6, 8]


def test_a_trial_of_two_processes_on_two_machines_trains_what_one_machine_trains(
    tmp_path: Path, cluster: tuple[Network, Machine]
) -> None:
    """Real trainings on the tiny model, to the bit; the search stands in another folder than the checkout."""
    made, head = cluster
    write_tiny_model(tmp_path / "model")
    write_tiny_data(tmp_path / "rows.jsonl", 300)
    (tmp_path / "space.yaml").write_text("adapter.rank: {grid: [2]}\n")
    settings: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model"), "compute_dtype": "float32"},
        "data": {"path": str(tmp_path / "rows.jsonl"), "train_rows": 64, "validation_rows": 20, "calibration_rows": 8,
                 "test_rows": 8, "max_tokens": 64},
        "train": {"global_batch": 8, "micro_batch": 4, "learning_rate": 0.01, "validate_every_steps": 2},
        "search": {"space": str(tmp_path / "space.yaml"), "workers_per_trial": 2, "trials": 1, "max_steps": 6,
                   "adapters": 1, "plain": False},
    }  # fmt: skip
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(settings))
    run = tmp_path / "runs"
    with worker(made, "worker4", 1), worker(made, "worker5", 1):
        words = ["-m", "pipeline.cli", "search", "--config", str(tmp_path / "given.yaml"), "--run-dir", str(run)]
        command = head.words(sys.executable, *words, folder=tmp_path)
        env = {**ENVIRONMENT, **TOKEN, "RAY_ADDRESS": HEAD}
        watched = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seen = wait_until("both ranks", lambda: ranks(made) if watched.poll() is None else {"none"}, PATIENCE_SECONDS)
        output, _ = watched.communicate(timeout=PATIENCE_SECONDS)
    print(output)
    assert watched.returncode == EXIT_OK, output
    assert seen == {"worker4", "worker5"}, output
    assert "1 at once, 2 processes each" in output and "Traceback" not in output
    trial = next(run.parent.glob("**/trials/trial_000"))
    config = load_config(trial / "config.yaml")
    (tmp_path / "one.yaml").write_text(dump_config(config))
    one = [sys.executable, "-m", "pipeline.cli", "train", "--config", str(tmp_path / "one.yaml")]
    subprocess.run([*one, "--run-dir", str(tmp_path / "one"), "launch.processes=2"], env=ENVIRONMENT, check=True)
    assert losses(trial) == losses(tmp_path / "one") and len(losses(trial)) == 6


def ranks(made: Network) -> set[str]:
    """Machines on which a process of a trial is at work, once both are."""
    found = {one.name for one in made.machines for p in one.processes() if "RayTrainWorker" in " ".join(cmdline(p))}
    return found if len(found) > 1 else set()


def cmdline(process: Any) -> list[str]:
    try:
        found: list[str] = process.cmdline()
    except Exception:  # it has ended
        return []
    return found
