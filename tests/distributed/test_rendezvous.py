"""Where processes meet: on the address given, on no other, and what is said where that cannot be."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil
import pytest

from pipeline.distributed import rendezvous
from pipeline.distributed.launcher import free_port
from pipeline.distributed.rendezvous import GLOO_INTERFACE, choose_interface, interface_towards, listen_at
from pipeline.errors import SetupError

NOWHERE = "203.0.113.7"
"""Documentation's address (RFC 5737): no machine has it."""


def test_a_socket_listens_on_the_given_address_alone() -> None:
    port = free_port()
    with listen_at("127.0.0.1", port) as listening:
        assert listening.getsockname() == ("127.0.0.1", port)
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(SetupError, match=rf"launch.master_port = {port}: is taken on 127.0.0.1"):
            listen_at("127.0.0.1", port)
    with listen_at("127.0.0.1", port):  # again at once, over what the connection left behind
        pass


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(SetupError, match=rf"launch.master_addr = '{NOWHERE}': is no address of this machine"):
        listen_at(NOWHERE, 29500)
    with pytest.raises(SetupError, match="cannot be looked up"):
        listen_at("no-such-node.invalid", 29500)


def test_a_name_that_stands_for_loopback_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives a machine's own name the address 127.0.1.1: the other nodes would wait for ever."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 29500))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(SetupError, match="stands for 127.0.1.1 on this machine, which no other node reaches"):
        listen_at("node0", 29500)


def test_gloo_stays_on_the_interface_towards_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = interface_towards("127.0.0.1")
    assert "127.0.0.1" in [one.address for one in psutil.net_if_addrs()[loopback]]
    for address in [one.address for given in psutil.net_if_addrs().values() for one in given]:
        if address.count(".") == 3 and not address.startswith("127."):
            assert interface_towards(address) != loopback
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    assert interface_towards("127.0.0.1") == ""


def test_an_interface_that_an_earlier_group_chose_is_not_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that trained on one machine starts the node of a job on several: its environment is inherited."""
    monkeypatch.setattr(rendezvous, "interface_towards", {"127.0.0.1": "lo", "10.0.0.1": "eth1"}.get)
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    for host, chosen in (("127.0.0.1", "lo"), ("10.0.0.1", "eth1"), ("127.0.0.1", "lo")):
        choose_interface(host)
        assert environment[GLOO_INTERFACE] == chosen
    choose_interface("unknown")
    assert GLOO_INTERFACE not in environment
    environment[GLOO_INTERFACE] = "ib0"  # the user's
    for host in ("127.0.0.1", "10.0.0.1", "unknown"):
        choose_interface(host)
        assert environment[GLOO_INTERFACE] == "ib0"


def test_the_first_process_serves_the_store_unless_torchrun_does(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(rendezvous.GLOO_INTERFACE, "chosen0")
    store, rank, size = next(rendezvous._meet("", timeout=timedelta(seconds=5)))
    store.set("said", "this")
    assert (store.get("said"), rank, size) == (b"this", 0, 1)
    assert os.environ[rendezvous.GLOO_INTERFACE] == "chosen0", "the user's word stands"
    with pytest.raises(ConnectionRefusedError):  # 127.0.0.2 is this machine, too: a socket on every address has it
        socket.create_connection(("127.0.0.2", port), timeout=5)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    joined, *_ = next(rendezvous._meet("", timeout=timedelta(seconds=5)))
    assert joined.get("said") == b"this"
