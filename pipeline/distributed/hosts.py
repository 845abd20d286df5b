"""Several nodes that this one reaches by ssh, as a DeepSpeed hostfile lists them: `NAME slots=PROCESSES` a line.

`python -m pipeline.distributed.hosts` opens a connection to each, by pdsh where it is installed and else by ssh alone,
on which `distributed/remote` runs DeepSpeed's launcher of that node. DeepSpeed's own runner needs pdsh, quotes words by
halves, passes on neither threads nor what a lifeline has to know, and leaves a node running whose command was killed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.config.launch import LaunchConfig
from pipeline.distributed.lifeline import PARENT, parent_is_gone
from pipeline.errors import ConfigError, SetupError, one_line

CONNECT_SECONDS = 10
POLL_SECONDS = 0.3
SSH = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
"""Nobody is there to type a password."""
CARRIED = (
    "LORADROP_", "PYTHON", "OMP_", "MKL_", "MALLOC_", "NCCL_", "GLOO_", "UCX_", "TORCH", "DEEPSPEED_", "HF_",
    "TRANSFORMERS_", "TOKENIZERS_", "WANDB_",
)
"""Beginnings of the variables that the nodes get from the command's environment; ssh passes on none."""
KEPT = {PARENT, "HF_TOKEN", "WANDB_API_KEY"}
"""A pid means nothing elsewhere, and every user of a machine sees its command lines."""
_LINE = re.compile(r"(\w[\w.@:-]*)\s+slots=([1-9]\d*)\s*(#.*)?")


def read_hosts(launch: LaunchConfig) -> dict[str, int]:
    """Host -> processes of it, in the order of the ranks; `launch.processes` counts more than the slots.

    Raises:
        ConfigError: there is no such file, or a line that says something else.
    """
    path, hosts = Path(str(launch.hostfile)), dict[str, int]()
    if not path.is_file():
        raise ConfigError("launch.hostfile", launch.hostfile, "does not exist", "Give a DeepSpeed hostfile.")
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        said = _LINE.fullmatch(line.strip())
        if said is None or said[1] in hosts:
            what = "names a host again" if said else "must be a host and its processes, as in: node0 slots=8"
            raise ConfigError("launch.hostfile", f"{path}:{number}", what, "One line for each host.")
        hosts[said[1]] = launch.processes or int(said[2])
    if not hosts:
        raise ConfigError("launch.hostfile", str(path), "names no host", "Write a line for each: node0 slots=8")
    return hosts


def meeting_address(launch: LaunchConfig, hosts: Sequence[str], run_dir: Path) -> str:
    """The first host's address, as ssh reaches it from here, once all of them have been asked for what they need.

    Raises:
        SetupError: one does not answer, has no such working folder, run folder or Python, or only this machine
            reaches the first.
    """
    needed = [f"-x {shlex.quote(sys.executable)}", f"-d {shlex.quote(os.getcwd())}", f"-d {shlex.quote(str(run_dir))}"]
    question = "".join(f"test {test} || {{ echo {test[3:]}; exit 9; }}; " for test in needed) + "echo $SSH_CONNECTION"
    asked = f"sh -c {shlex.quote(question)}"  # whatever shell the user has there

    def ask(host: str) -> str:
        try:
            done = subprocess.run(
                [*SSH, host, asked], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
                timeout=3 * CONNECT_SECONDS,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise SetupError("launch.hostfile", launch.hostfile, "needs ssh", "Install an ssh client.") from error
        except subprocess.TimeoutExpired as error:
            raise _unreachable(host, "no answer in time") from error
        said = one_line(done.stdout.strip().rpartition("\n")[2])
        if done.returncode == 9:
            remedy = "Checkout, .venv, working folder and --run-dir must be at the same path on every node."
            raise SetupError("launch.hostfile", host, f"has no {said}", remedy)
        if done.returncode:
            complaint = one_line(done.stderr.strip().rpartition("\n")[2])
            raise _unreachable(host, complaint or f"ssh ends with {done.returncode}")
        return said

    with ThreadPoolExecutor(min(32, len(hosts))) as pool:
        connections = list(pool.map(ask, hosts))
    if launch.master_addr:
        return launch.master_addr
    address = (connections[0].split() or [hosts[0]])[2:3] or [hosts[0]]
    if len(hosts) > 1 and (address[0].startswith("127.") or address[0] == "::1"):
        what = f"stands for {address[0]} on this machine, which no other node reaches"
        raise SetupError("launch.hostfile", hosts[0], what, "Give the first node's address, or launch.master_addr.")
    return address[0]


def _unreachable(host: str, why: str) -> SetupError:
    remedy = f"`ssh {host} true` must work from here without a password; or start every node yourself (launch.nodes)."
    return SetupError("launch.hostfile", host, f"cannot be reached by ssh: {why}", remedy)


def hosts_command(launch: LaunchConfig, run_dir: Path, port: str, program: Sequence[str]) -> list[str]:
    """The command line that runs a program (a module and its words) on all hosts of the hostfile.

    Raises:
        ConfigError, SetupError: as `read_hosts` and `meeting_address`.
    """
    hosts = read_hosts(launch)
    address = meeting_address(launch, list(hosts), run_dir)
    world = json.dumps({host: list(range(slots)) for host, slots in hosts.items()})
    return [sys.executable, "-m", "pipeline.distributed.hosts", world, address, port, str(run_dir), *program]


def remote_command(node: str, given: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a node's shell is told: run `distributed/remote` with this environment, in this working folder.

    Args:
        node: its number, from 0.
        given: what `hosts_command` passes on.
    """
    carried = [
        f"{name}={value}" for name, value in sorted(environment.items())
        if name.startswith(CARRIED) and name not in KEPT and "\n" not in value
    ]
    remote = [sys.executable, "-m", "pipeline.distributed.remote", node, *given]
    return f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*carried, *remote])}"


def main(words: Sequence[str]) -> int:
    """Connect to all hosts, and wait for them; the largest exit code.

    What runs there ends with its connection, and the connections end when the command that wants them is gone.
    """
    connections = connect(list(json.loads(words[0])), words)
    while any(connection.poll() is None for connection in connections):
        if parent_is_gone():
            for connection in connections:
                connection.kill()
        time.sleep(POLL_SECONDS)
    return max(connection.wait() & 255 for connection in connections)


def connect(hosts: Sequence[str], words: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Start what each host is told: one process for all, or one for each."""
    if shutil.which("pdsh"):  # its %n is the number of the node, and its % has to be written twice
        marked = remote_command("\0", words, os.environ).replace("%", "%%").replace("\0", "%n")
        command = ["pdsh", "-S", "-N", "-R", "ssh", "-f", str(len(hosts)), "-w", ",".join(hosts), marked]
        more = f"-oBatchMode=yes {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}".strip()
        return [subprocess.Popen(command, env={**os.environ, "PDSH_SSH_ARGS_APPEND": more})]
    commands = [remote_command(str(node), words, os.environ) for node in range(len(hosts))]
    return [
        subprocess.Popen([*SSH, host, command], stdin=subprocess.PIPE)  # which this process's end closes
        for host, command in zip(hosts, commands, strict=True)
    ]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
