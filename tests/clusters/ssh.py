"""sshd on the machines of a test, with keys of its own: `ssh NAME` works among them and nowhere else."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusters.machines import Machine, Network, need, network, wait_until

SERVER = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
CLIENT = """
Host *
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile none
    LogLevel ERROR
"""


@contextmanager
def ssh_network(folder: Path, names: list[str]) -> Iterator[tuple[Network, list[Machine]]]:
    """Machines that reach each other by ssh and their names."""
    need("sshd", "ssh", "ssh-keygen", of="openssh-server")
    with network(folder, names) as made:
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        (folder / "sshd_config").write_text(SERVER.format(folder=folder))
        (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
        public = (folder / "host_key.pub").read_text().rpartition(" ")[0]
        (folder / "known_hosts").write_text("".join(f"{name},{a} {public}\n" for name, a in made.addresses.items()))
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, of Debian; systemd would make it
        mounts = [(folder / "ssh_config", "/etc/ssh/ssh_config")]
        machines = [made.start(name, mounts) for name in names]
        servers = []
        try:
            for machine in machines:
                serve = machine.words("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config"))
                with (folder / f"sshd.{machine.name}.log").open("w") as log:
                    servers.append(subprocess.Popen(serve, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
                wait_until(f"sshd on {machine.name}", lambda there=machine: _answers(there))
            yield made, machines
        finally:
            for server in servers:
                server.kill()
                server.wait()


def _answers(machine: Machine) -> bool:
    listening = Path(f"/proc/{machine.first}/net/tcp").read_text()
    return f":{22:04X} 00000000:0000 0A" in listening
