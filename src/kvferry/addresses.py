"""What a host name or number says of who can reach a listener. Pure; nothing is resolved."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`; any name but `localhost` counts as reachable."""
    if host in ("localhost", "ip6-localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether `host` stands for every interface: an address to bind, to which no peer can connect."""
    return host.strip("[]") in ("0.0.0.0", "::", "*")


def host_of(address: str) -> str:
    """The host of `scheme://host:port`, without brackets."""
    return address.rpartition("://")[2].rpartition(":")[0].strip("[]")
