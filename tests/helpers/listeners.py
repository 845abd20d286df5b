"""Which sockets a command and all its descendants listen on, seen over its whole life. Linux's /proc, no tool."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psutil

from helpers import ROOT

LISTENING = "0A"


@dataclass(frozen=True)
class Listener:
    """A socket that accepts connections."""

    process: str
    address: str
    """Numbers; `0.0.0.0` and `::` are every interface."""

    @property
    def outside(self) -> bool:
        """Whether another machine can reach it."""
        return not ipaddress.ip_address(self.address).is_loopback


def listeners(root: int) -> Iterator[tuple[Listener, int]]:
    """Listeners of a process and its descendants now, with their ports; each process is asked in its own network."""
    try:
        tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            name, sockets = process.name(), _sockets(process.pid)
            for table in ("tcp", "tcp6"):
                for row in Path(f"/proc/{process.pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                    columns = row.split()
                    if columns[3] == LISTENING and columns[9] in sockets:
                        numbers, _, port = columns[1].partition(":")
                        yield Listener(name, _address(numbers)), int(port, 16)
        except (OSError, psutil.Error):  # it has ended meanwhile
            continue


def _sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process holds."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(entry.path)
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def _address(numbers: str) -> str:
    """The kernel prints words of 4 bytes in the machine's order; IPv4 within IPv6 is shown as what it is."""
    words = [bytes.fromhex(numbers[at : at + 8])[::-1] for at in range(0, len(numbers), 8)]
    found = ipaddress.ip_address(b"".join(words))
    return str(getattr(found, "ipv4_mapped", None) or found)


def allowed(listener: Listener) -> bool:
    """Whether a row of SECURITY.md's table (`process` | address | what it is) names it."""
    rows = re.findall(r"^\| `([^`]+)` \| (\S+) \|", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.MULTILINE)
    return any(fnmatch(listener.process, name) and listener.address == address for name, address in rows)


@dataclass
class Watched:
    """A command that has ended."""

    code: int
    output: str
    seen: set[Listener] = field(default_factory=set)

    @property
    def outside(self) -> set[tuple[str, str]]:
        """(process, address) of what other machines could reach."""
        return {(one.process, one.address) for one in self.seen if one.outside}


def watch(command: Sequence[str], timeout: float, **options: Any) -> Watched:
    """Run a command to its end and note every listener of its tree, several times a second."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
    )
    watched, ended = Watched(0, ""), threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            watched.seen |= {one for one, _ in listeners(process.pid)}

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        watched.output, _ = process.communicate(timeout=timeout)
    finally:
        ended.set()
        looking.join()
        if process.poll() is None:
            process.kill()
    watched.code = process.returncode
    return watched
