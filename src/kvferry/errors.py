"""The error tree. Every failure that a caller may handle is one of these, with who, where and why.

    KVError                    request_id, peer, stage; says what was seen, expected, and what to do
      ConfigError              a setting is unknown or its value is bad                  not retryable
      CompatibilityError       the two sides differ where they must agree                not retryable
      AuthenticationError      a peer could not prove that it knows the cluster secret   not retryable
      WireError                bytes that are no valid frame or message                  not retryable
      TransportError           bytes could not be moved                                  retryable
        TransferTimeout        the deadline passed first                                 retryable
          TransferUnfinished   ... and bytes may still land in the target blocks         retryable
        PeerGone               the other process is dead or unreachable                  retryable
        TransportClosed        this side closed it                                       not retryable
        RegistrationError      offsets, sizes, tokens or memory that do not fit          not retryable
      PoolError                the pool could not serve                                  retryable
        BlockNotFound          the block left between look-up and read                   retryable
        PoolExhausted          no room, or a quota is reached                            retryable
        LeaseExpired           the owner may have reused the blocks: recompute           not retryable
      IntegrityError           the bytes that arrived are not the bytes that were sent   retryable
      HandoffAborted           the client, or the router for it, gave the request up     not retryable
      NoInstanceAvailable      no instance can take the request now                      retryable

`retryable` means: the same call may succeed on another path or a little later. A bug in kvferry itself is
`InvalidTransition`, which is no KVError, so that nothing which handles failures hides it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import ClassVar


class KVError(Exception):
    """Base of all failures. `stage` is the word of the handoff's life in which it happened (see protocol)."""

    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        request_id: str | None = None,
        peer: str | None = None,
        stage: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.peer = peer
        self.stage = stage

    @property
    def cause(self) -> str:
        """The class name in the form used as a metric label and in outcomes, such as `peer_gone`."""
        name = type(self).__name__
        return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))

    def __str__(self) -> str:
        named = {"request": self.request_id, "peer": self.peer}
        facts = {key: name for key, name in named.items() if name and not _is_named(name, self.message)}
        if self.stage:
            facts["stage"] = self.stage
        where = ", ".join(f"{key} {value}" for key, value in facts.items())
        return f"{self.message} [{where}]" if where else self.message


class ConfigError(KVError):
    """A setting is unknown or its value is bad. The message names the key, its source and the nearest right one."""


class CompatibilityError(KVError):
    """The two sides differ where they must agree. The message names both values."""


class AuthenticationError(KVError):
    """A peer could not prove that it knows the cluster secret."""


class WireError(KVError):
    """Bytes that are no valid frame or message. The connection that brought them is closed."""


class TransportError(KVError):
    """Bytes could not be moved. After failure the target blocks hold unspecified bytes; nothing more is written."""

    retryable = True


class TransferTimeout(TransportError):
    """The deadline passed before the transfer was complete."""


class TransferUnfinished(TransferTimeout):
    """The transfer was given up, but its transport can't take it back: bytes may still land in the target blocks.

    The exception to what holds after a failure: keep these blocks aside until `is_over()` is true. It may be called at
    any time, from any thread; it is true at the latest when the engine is closed.
    """

    def __init__(self, message: str, *, is_over: Callable[[], bool], peer: str | None = None) -> None:
        super().__init__(message, peer=peer)
        self.is_over = is_over


class PeerGone(TransportError):
    """The other process is dead or unreachable."""


class TransportClosed(TransportError):
    """This side closed the transport or the engine while the transfer was pending."""

    retryable = False


class RegistrationError(TransportError):
    """Offsets, sizes, tokens or memory that do not fit. Raised before any byte moves; nothing is written."""

    retryable = False


class PoolError(KVError):
    """The pool could not serve."""

    retryable = True


class BlockNotFound(PoolError):
    """The block left between look-up and read. A plain miss is a value, not this."""


class PoolExhausted(PoolError):
    """There is no room, or a quota is reached."""


class LeaseExpired(PoolError):
    """The owner may have reused the blocks: the bytes read are worthless. Recompute."""

    retryable = False


class IntegrityError(KVError):
    """The bytes that arrived are not the bytes that were sent (digest mismatch)."""

    retryable = True


class HandoffAborted(KVError):
    """The client, or the router for it, gave the request up."""


class NoInstanceAvailable(KVError):
    """No instance can take the request now."""

    retryable = True


def _is_named(name: str, message: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", message) is not None


def system_reason(error: OSError) -> str:
    """The system's own words for an error, in place of which asyncio puts the address once more."""
    if error.errno is not None and error.errno in errno.errorcode:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


class InternalError(KVError):
    """A bug in kvferry; the log has its traceback. What asked for it fails, nothing else does."""


class InvalidTransition(Exception):
    """A state machine got an event that its state forbids: a bug in kvferry. Carries the object's story."""

    def __init__(self, subject: str, state: str, event: str, story: tuple[str, ...] = ()) -> None:
        lines = "".join(f"\n  {line}" for line in story)
        super().__init__(f"{subject}: {event} is not possible in state {state}; its story:{lines or ' (none)'}")
        self.subject, self.state, self.event, self.story = subject, state, event, story
