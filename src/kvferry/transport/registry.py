"""Which transports there are: schemes to implementations. A third party registers its own with one call."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from kvferry.errors import ConfigError, TransportError
from kvferry.transport.base import Region, Transport
from kvferry.types import Incarnation

Reach = Literal["process", "host", "network"]
"""How far a transport goes. Farther ones are opened only where no nearer one serves a peer."""


class TransportSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What transports can be told. Sizes in bytes, times in seconds.

    `max_streams` and `socket_buffer_bytes` are tcp's. A network that is silent for `dead_after_s` counts as cut.
    """

    max_streams: int = 4
    socket_buffer_bytes: int = 256 << 10
    dead_after_s: float = 5.0
    verify_digest: bool = False


class TransportContext(NamedTuple):
    """What an engine gives the transports that belong to it.

    Args:
        find_region: this engine's live region with that id, or None.
        shared_listener: whether the engine accepts data connections on its own listener and passes them on.
    """

    incarnation: Incarnation
    secret: bytes | None
    settings: TransportSettings
    find_region: Callable[[int], Region | None]
    shared_listener: bool = False


class Registration(NamedTuple):
    """`implementation` is `package.module:Class`, imported on first use; the class takes a TransportContext."""

    scheme: str
    implementation: str
    reach: Reach


_registrations: dict[str, Registration] = {}


def register_transport(scheme: str, implementation: str, *, reach: Reach) -> None:
    """Make a transport known under `scheme`.

    Raises: ConfigError if the scheme is taken by another implementation.
    """
    known = _registrations.get(scheme)
    if known is not None and known.implementation != implementation:
        raise ConfigError(f"transport scheme {scheme!r} is taken by {known.implementation}; choose another one")
    _registrations[scheme] = Registration(scheme, implementation, reach)


def find_transport(scheme: str) -> Registration:
    """Raises: ConfigError for an unknown scheme; the message names the nearest known one."""
    known = _registrations.get(scheme)
    if known is None:
        near = difflib.get_close_matches(scheme, _registrations, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(_registrations))}"
        raise ConfigError(f"there is no transport {scheme!r}; {hint}")
    return known


def create_transport(scheme: str, context: TransportContext) -> Transport:
    """An instance of the transport for one engine.

    Raises:
        ConfigError: the scheme is unknown.
        TransportError: it is known but cannot work in this process; the message says why.
    """
    known = find_transport(scheme)
    module, _, name = known.implementation.partition(":")
    try:
        implementation = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise TransportError(f"transport {scheme} is not installed here: {error}") from error
    transport = implementation(context)
    assert isinstance(transport, Transport)
    return transport


register_transport("inproc", "kvferry.transport.inproc:InprocTransport", reach="process")
register_transport("shm", "kvferry.transport.shm:ShmTransport", reach="host")
register_transport("cuda", "kvferry.transport.cuda:CudaTransport", reach="host")
register_transport("tcp", "kvferry.transport.tcp:TcpTransport", reach="network")
register_transport("nixl", "kvferry.transport.nixl:NixlTransport", reach="network")
