"""Whether the node that takes what an engine saves can fetch it: over memory on one host, else from a listener."""

from __future__ import annotations

import contextlib
import socket

from kvferry.addresses import host_of, is_loopback
from kvferry.errors import ConfigError


def is_here(host: str) -> bool:
    """Whether `host` names an address of this machine: only those can be bound. What cannot be resolved is not here."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return True
    return False


def require_way_back(node: str, listen: str) -> None:
    """
    Args:
        node: its `tcp://host:port`.
        listen: the address at which this engine listens.
    Raises: ConfigError where a node of another host could not reach this engine.
    """
    if is_loopback(host_of(listen)) and not is_here(host_of(node)):
        raise ConfigError(
            f"the pool node {node} is on another host, and fetches what this engine saves from where it listens for "
            f"peers, which is {listen}, this host's loopback: let it listen at tcp://0.0.0.0:0 or an address that the "
            "node reaches (which takes a cluster secret), or start a node on this host"
        )
