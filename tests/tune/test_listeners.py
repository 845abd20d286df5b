"""A search's Ray: where it listens, and that nobody without its token gets in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import ROOT
from helpers.listeners import allowed, listeners, watch
from helpers.searches import PATIENCE_SECONDS, end, start, stub_command, stub_environment, wait_for, write_config

from pipeline import EXIT_OK, EXIT_USER, dump_config, load_config

pytestmark = pytest.mark.slow

JOIN = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("ran", ray.get(ray.remote(lambda: "as them").options(num_cpus=0).remote()))
"""
KNOCK = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1])
print("in")
"""
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""An attacker on this machine has Ray look at 127.0.0.1 itself, not at the outer address in its place."""


def without_token(home: Path, **settings: str) -> dict[str, str]:
    """The environment of somebody else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), "RAY_py_gcs_connect_timeout_s": "5", **settings}


def attempt(command: list[str], environment: dict[str, str]) -> str:
    """What somebody sees who tries, until he gives up."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired as gave_up:
        return (gave_up.stdout or b"").decode() + (gave_up.stderr or b"").decode()
    return done.stdout + done.stderr


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


def ray_start(address: str) -> list[str]:
    """Joins a cluster with a node of one's own."""
    return [str(Path(sys.executable).with_name("ray")), "start", f"--address={address}"]


def port_of(root: int) -> int:
    """Where Ray's directory of processes listens."""
    return next(port for one, port in listeners(root) if one.process == "gcs_server")


def test_nobody_without_the_token_gets_in(tmp_path: Path) -> None:
    write_config(tmp_path)
    process = start(tmp_path, STUB_SECONDS="20")
    try:
        wait_for(tmp_path, "report", 1)
        address = f"127.0.0.1:{port_of(process.pid)}"
        tree = psutil.Process(process.pid).children(recursive=True)
        given = next(one for one in tree if one.name() == "raylet").environ()
        assert given["RAY_AUTH_MODE"] == "token" and len(given["RAY_AUTH_TOKEN"]) == 64
        for settings in ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}):
            said = attempt(python(KNOCK, address), without_token(tmp_path, **settings))
            assert "AuthenticationError" in said and "\nin" not in said, said
        said = attempt(python(JOIN, address), without_token(tmp_path, **ON_LOOPBACK))
        assert "InvalidAuthToken" in said and "ran" not in said, said
        assert "Ray runtime started" not in attempt(ray_start(address), without_token(tmp_path))
        token = {name: given[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        assert "ran as them" in attempt(python(JOIN, address), without_token(tmp_path, **ON_LOOPBACK, **token))

        scratch = Path((tmp_path / "search" / ".ray" / "scratch").read_text().strip())
        assert scratch.stat().st_mode & 0o077 == 0
        for path in [*scratch.rglob("*"), *(tmp_path / "search").rglob("*")]:
            if path.is_file() and not path.is_socket():
                assert given["RAY_AUTH_TOKEN"].encode() not in path.read_bytes(), f"the token lies in {path}"
        assert not any(given["RAY_AUTH_TOKEN"] in " ".join(one.cmdline()) for one in tree if one.is_running())
    finally:
        end(process)


def test_another_machine_reaches_nothing(tmp_path: Path, two_namespaces: tuple[str, str]) -> None:
    """The search runs in one network namespace; from the other, its ports are closed."""
    ours, theirs = (("ip", "netns", "exec", name) for name in two_namespaces)
    # Ray registers under the address from which the machine reaches the world; without a way there under 127.0.0.1.
    subprocess.run(["ip", "-n", two_namespaces[0], "route", "add", "default", "via", "10.77.0.2"], check=True)
    write_config(tmp_path)
    process = subprocess.Popen(
        [*ours, *stub_command()], cwd=tmp_path, env=stub_environment(STUB_SECONDS="2"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(tmp_path, "report", 1)
        found = {(one, port) for one, port in listeners(process.pid)}
        assert "gcs_server" in {one.process for one, _ in found}
        assert not {one for one, _ in found if not allowed(one)}
        knock = "import socket, sys; socket.create_connection(('10.77.0.1', int(sys.argv[1])), timeout=5)"
        nobody = without_token(tmp_path)
        for _, port in found:
            assert "ConnectionRefusedError" in attempt([*theirs, *python(knock, str(port))], nobody)
        address = f"10.77.0.1:{port_of(process.pid)}"
        assert "ran" not in attempt([*theirs, *python(JOIN, address)], nobody)
        assert "Ray runtime started" not in attempt([*theirs, *ray_start(address)], nobody)
    finally:
        end(process)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_a_trial_of_two_processes_listens_on_the_loopback_interface(tmp_path: Path, tiny_settings: list[str]) -> None:
    """On the tiny model; tests/tune/test_search.py looks at trials of one process."""
    (tmp_path / "space.yaml").write_text("adapter.rank: {grid: [2]}\n")
    settings = [
        *tiny_settings, f"search.space={tmp_path / 'space.yaml'}", "search.workers_per_trial=2",
        "search.trials=1", "search.adapters=1", "train.validate_every_steps=2",
    ]
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, settings)))
    command = ["-m", "tune", "--config", str(tmp_path / "config.yaml"), "--folder", str(tmp_path / "search")]
    watched = watch([sys.executable, *command], 400, cwd=ROOT)
    assert watched.code == EXIT_OK, watched.output
    assert {"gcs_server", "raylet"} <= {one.process for one in watched.seen}
    assert not {one for one in watched.seen if not allowed(one)}, watched.seen


def test_an_attached_cluster_that_wants_another_token_is_the_users_error(tmp_path: Path) -> None:
    """At once, with what to set; `ray.init` would try for minutes."""
    write_config(tmp_path)
    process = start(tmp_path, STUB_SECONDS="4")
    other = tmp_path / "other"
    other.mkdir()
    write_config(other)
    try:
        wait_for(tmp_path, "report", 1)
        address = f"127.0.0.1:{port_of(process.pid)}"
        for settings in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}):
            environment = without_token(other, RAY_ADDRESS=address, **ON_LOOPBACK, **settings)
            done = subprocess.run(
                stub_command(), cwd=other, env={**environment, "PYTHONPATH": stub_environment()["PYTHONPATH"]},
                capture_output=True, text=True, timeout=PATIENCE_SECONDS,
            )  # fmt: skip
            assert done.returncode == EXIT_USER, done.stdout + done.stderr
            assert f"RAY_ADDRESS = '{address}': is a cluster that asks for its token" in done.stderr
            assert "RAY_AUTH_TOKEN" in done.stderr and "Traceback" not in done.stderr
    finally:
        end(process)
