"""Where the processes of a stage meet: torch's store and gloo's sockets, on the address given and on no other.

By itself torch's store listens on every interface of the first process's machine, and gloo on the address that the
machine's name stands for. Neither asks who is there, so both stay on the way that the processes use: the loopback
interface where they share a machine, the address of the first node where they do not.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed
from torch.distributed.rendezvous import register_rendezvous_handler

from pipeline.errors import SetupError

SCHEME = "loradrop"
MEETING_PLACE = f"{SCHEME}://"
"""The `init_method` under which torch asks `_meet`."""
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_CHOSEN = "LORADROP_GLOO_INTERFACE"
"""What `choose_interface` has put there: a process that inherits both does not take it for the user's wish."""


def _meet(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Any, int, int]]:
    """torch's handler for `MEETING_PLACE`: yields the store, this process's rank and how many there are."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    choose_interface(host)
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)  # torchrun serves it itself
    listening = listen_at(host, port).detach() if serves else None
    yield torch.distributed.TCPStore(host, port, size, serves, timeout, master_listen_fd=listening), rank, size


register_rendezvous_handler(SCHEME, _meet)


def listen_at(host: str, port: int) -> socket.socket:
    """A socket bound to exactly this address of this machine.

    Raises:
        SetupError: the address is not this machine's, is one that no other machine reaches, or its port is taken.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise SetupError(
            "launch.master_addr", host, f"cannot be looked up ({error.strerror})",
            "Give the address of node 0 in numbers.",
        ) from error
    address = str(place[0])
    if is_loopback(address) and not (is_loopback(host) or host == "localhost"):
        raise SetupError(
            "launch.master_addr", host, f"stands for {address} on this machine, which no other node reaches",
            "Give the address of node 0 in numbers.",
        )
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what an earlier start left in TIME_WAIT
    try:
        listening.bind(place)
        listening.listen(socket.SOMAXCONN)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise SetupError("launch.master_port", port, f"is taken on {address}", "Set another one.") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise SetupError(
                "launch.master_addr", host, "is no address of this machine, which is node 0",
                "Give an address that `hostname -I` prints on node 0, or number the nodes otherwise.",
            ) from error
        raise
    return listening


def choose_interface(host: str) -> None:
    """Have gloo stay on the interface towards `host`, unless the user has named one."""
    if (chosen := os.environ.pop(_CHOSEN, None)) is not None and os.environ.get(GLOO_INTERFACE) == chosen:
        del os.environ[GLOO_INTERFACE]
    if GLOO_INTERFACE not in os.environ and (interface := interface_towards(host)):
        os.environ.update({GLOO_INTERFACE: interface, _CHOSEN: interface})


def interface_towards(host: str) -> str:
    """Name of the interface from which this machine reaches `host`; empty where that cannot be said."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing: the kernel picks the way, and with it the own address
            own = str(probe.getsockname()[0])
    except OSError:
        return ""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, given in interfaces if own in [one.address for one in given]), "")


def is_loopback(address: str) -> bool:
    """Whether these are the numbers of a loopback address; a name is none."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
