"""Where a process listens, told by itself; and who holds a port, so that "address in use" names whom to look at."""

from __future__ import annotations

import sys
from typing import NamedTuple

import psutil

from kvferry.errors import ConfigError

LISTENING = "kvferry listening "
"""Begins the line on standard output by which a process tells its URL."""


class PortHolder(NamedTuple):
    """A process that listens on a port."""

    pid: int
    name: str
    command: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}: {self.command})"


def holder_of_port(port: int) -> PortHolder | None:
    """The process that listens on this TCP port; None if there is none or it belongs to another user."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or connection.laddr.port != port or connection.pid is None:
            continue
        try:
            process = psutil.Process(connection.pid)
            command = " ".join(process.cmdline())
            # Command lines can be pages long, and the beginning says which program it is.
            return PortHolder(process.pid, process.name(), command if len(command) <= 160 else command[:157] + "...")
        except psutil.Error:
            return None
    return None


def port_taken(host: str, port: int, what: str) -> ConfigError:
    """The error for a port that could not be bound, with its holder's name.

    Args:
        what: what wanted the port, such as `router.port`.
    """
    holder = holder_of_port(port)
    who = f"{holder} holds it" if holder else "a process that this user cannot see holds it"
    return ConfigError(f"{what}: port {port} on {host} is taken: {who}; stop it, choose another port, or 0 for any")


def tell_listening(url: str) -> None:
    """Tell the process that started this one, on standard output, where this one really listens and serves now."""
    sys.stdout.write(f"{LISTENING}{url}\n")
    sys.stdout.flush()
