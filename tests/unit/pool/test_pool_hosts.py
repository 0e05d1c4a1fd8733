"""A node of another host must be able to reach the engine whose blocks it takes: said at the start."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from kvferry.errors import ConfigError
from kvferry.pool import hosts
from kvferry.pool.hosts import require_way_back

HERE, ELSEWHERE = "10.1.2.3", "10.9.9.9"


class Probe:
    """A socket of a machine that has loopback and one address more."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def bind(self, address: tuple[str, int]) -> None:
        if not address[0].startswith("127.") and address[0] != HERE:
            raise OSError("Cannot assign requested address")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        found = {"node1": HERE, "node2": ELSEWHERE, "localhost": "127.0.0.1"}.get(host, host)
        if not found[0].isdigit():
            raise OSError("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, port))]

    monkeypatch.setattr(hosts.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(hosts.socket, "socket", Probe)


@pytest.mark.parametrize("node", ["127.0.0.1", "127.0.0.2", "localhost", HERE, "node1"])
def test_a_node_of_this_host_needs_no_way_back(node: str) -> None:
    require_way_back(f"tcp://{node}:7400", "tcp://127.0.0.1:0")


@pytest.mark.parametrize("node", [ELSEWHERE, "node2", "unheard-of"])
def test_a_node_elsewhere_needs_a_listener_that_it_reaches(node: str) -> None:
    with pytest.raises(ConfigError, match=r"on another host.*tcp://0\.0\.0\.0:0"):
        require_way_back(f"tcp://{node}:7400", "tcp://127.0.0.1:0")
    require_way_back(f"tcp://{node}:7400", "tcp://0.0.0.0:0")
    require_way_back(f"tcp://{node}:7400", f"tcp://{HERE}:7000")
