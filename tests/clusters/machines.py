"""Machines of a test on this one: each has a network, a name, processes and mounts of its own; files they share.

A machine's first process is the only thing to end: the kernel ends all others of its process namespace with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
"""Of commands on the machines, from which there is no way out."""
PREFIX = f"ldc{os.getpid()}x"
"""Of the names of network namespaces: nobody else's begin so."""
PRIVATE = ("/dev/shm", "/tmp/ray")
"""What programs take for this machine's own: a file system in memory, of each machine alone."""
FIRST = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
shift 2
while [ $# -gt 0 ]; do mount $1; shift; done
trap '' CHLD  # also after exec: the kernel buries orphans
echo up
exec sleep infinity
"""


@dataclass(frozen=True)
class Machine:
    """One of them."""

    name: str
    address: str
    first: int
    """Pid of its first process, as it is seen from outside."""

    def words(self, *command: str, folder: Path = ROOT, **environment: str) -> list[str]:
        """The command line that runs a command there, in a folder."""
        enter = ["nsenter", f"--target={self.first}", "--net", "--uts", "--pid", "--mount", "--", "env"]
        return [*enter, f"--chdir={folder}", *(f"{name}={value}" for name, value in environment.items()), *command]

    def run(self, *command: str, timeout: float = 120, **options: Any) -> str:
        """What a command that ends well prints there."""
        done = subprocess.run(self.words(*command, **options), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{self.name}: {shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All that run there, the first one apart."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.first).children(recursive=True) + self._orphans()
        return []

    def _orphans(self) -> list[psutil.Process]:
        """Those that entered it from outside: their parents are not there."""
        here, found = os.readlink(f"/proc/{self.first}/ns/pid"), list[psutil.Process]()
        below = {one.pid for one in psutil.Process(self.first).children(recursive=True)} | {self.first}
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if process.pid not in below and os.readlink(f"/proc/{process.pid}/ns/pid") == here:
                    found.append(process)
        return found

    def end(self) -> None:
        """Switch it off: nothing of it goes on, and its address does not answer."""
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(self.first)
            first.kill()
            psutil.wait_procs([first], 10)


class Network:
    """A switch, and the machines on it."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """
        Args:
            folder: takes the files that are mounted.
            names: all machines that there will be, whether they run or not.
        """
        self.folder, self.switch = folder, f"{PREFIX}s"
        self.addresses = {name: f"10.78.0.{number}" for number, name in enumerate(names, start=1)}
        self.machines: list[Machine] = []
        self._started: list[subprocess.Popen[str]] = []
        self._hosts = folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in self.addresses.items()))
        for path in PRIVATE:
            Path(path).mkdir(exist_ok=True)

    def open(self) -> None:
        """Plug the switch in. Raises `subprocess.CalledProcessError` where the machine does not allow it."""
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge0", "up")

    def start(self, name: str, mounts: Sequence[tuple[Path, str]] = ()) -> Machine:
        """Switch a machine on; `mounts`: files of its own, and what they stand in for."""
        space, port = f"{PREFIX}{name}", f"to-{name}"
        ip("netns", "add", space)
        ip("link", "add", port, "netns", self.switch, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", self.switch, "link", "set", port, "master", "bridge0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", space, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        # Nobody is there. Programs that ask by which address they reach the world get this machine's.
        ip("-n", space, "route", "add", "default", "via", "10.78.0.254")
        own = [f"-t tmpfs none {path}" for path in PRIVATE] + [f"--bind {source} {path}" for source, path in mounts]
        alone = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{space}", *alone, "sh", "-c", FIRST, "sh", name, str(self._hosts), *own],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._started.append(process)
        assert process.stdout is not None
        if (said := process.stdout.readline()) != "up\n":
            raise subprocess.CalledProcessError(1, "unshare", stderr=said)
        machine = Machine(name, self.addresses[name], psutil.Process(process.pid).children()[0].pid)
        self.machines.append(machine)
        return machine

    def close(self) -> None:
        """End all."""
        for process in self._started:
            process.kill()  # and the machine's first process with it
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        for machine in self.machines:
            machine.end()
        for name in [self.switch, *(f"{PREFIX}{name}" for name in self.addresses)]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*words: str) -> None:
    """Run iproute2's `ip`. Raises `subprocess.CalledProcessError`."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def network(folder: Path, names: Sequence[str]) -> Iterator[Network]:
    """A switched-on network; skipped, by name, where the machine does not allow one."""
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in ("ip", "nsenter", "unshare")):
        pytest.skip("needs root and ip netns (apt install iproute2)")
    folder.mkdir()
    made = Network(folder, names)
    try:
        try:
            made.open()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs root and ip netns, which this machine does not allow: {str(error.stderr).strip()}")
        yield made
    finally:
        made.close()


def losses(run_dir: Path) -> list[float]:
    """Of every step that has been written; none where the run has not begun."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run_dir / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
        return [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]
    return []


def need(*tools: str, of: str) -> None:
    """Skip, by name, where programs are missing."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    if missing := [tool for tool in tools if shutil.which(tool, path=path) is None]:
        pytest.skip(f"needs {', '.join(missing)} (apt install {of})")


def wait_until(what: str, true: Any, seconds: float = 900) -> Any:
    """What `true()` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not after {seconds:g} s: {what}"
        time.sleep(0.1)
    return found
