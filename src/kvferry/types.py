"""Frozen values that every room shares: identities, tickets, outcomes."""

from __future__ import annotations

import enum
import secrets
from typing import Any, Literal, NewType

import msgspec

HandoffId = NewType("HandoffId", str)
"""32 lower-case hex digits: 128 random bits, new for each attempt."""

Incarnation = NewType("Incarnation", int)
"""63 random bits, non-zero, drawn when a process starts: an instance that restarts is another incarnation."""

Word = NewType("Word", int)
"""A lease's word: 63 random bits, non-zero (it is stored as a signed 64-bit integer); 0 means revoked."""

Role = Literal["prefill", "decode", "both"]
Side = Literal["source", "target"]


def new_handoff_id() -> HandoffId:
    """A fresh handoff id."""
    return HandoffId(secrets.token_hex(16))


def new_incarnation() -> Incarnation:
    """A fresh incarnation."""
    return Incarnation(secrets.randbits(63) | 1)


class TerminalState(enum.StrEnum):
    """How a request ended; exactly one of these, on every side that knows of it."""

    DELIVERED = "delivered"
    RECOMPUTED = "recomputed"
    ABORTED = "aborted"
    FAILED = "failed"


class Stage(enum.StrEnum):
    """Where in its life a request is, or was when it failed."""

    QUEUE = "queue"
    RESERVING = "reserving"
    WAITING = "waiting"
    PULLING = "pulling"
    VERIFYING = "verifying"
    DRAINING = "draining"
    PREFILL = "prefill"
    DECODE = "decode"
    STREAMING = "streaming"


class InstanceRef(msgspec.Struct, frozen=True):
    """One instance as its peers see it.

    `addresses` are the handoff listeners as really bound (`tcp://host:port`), one for each tensor-parallel rank.
    """

    instance_id: str
    incarnation: int
    addresses: tuple[str, ...] = ()


class HandoffTicket(msgspec.Struct, frozen=True):
    """What the router mints for one attempt at one request; travels as `kv_transfer_params`.

    `remaining_s` is time left, never a clock reading. `side` says which half of the pair receives this copy.
    """

    handoff: HandoffId
    side: Side
    source: InstanceRef
    target: InstanceRef
    remaining_s: float
    attempt: int = 0

    def as_params(self) -> dict[str, Any]:
        """The JSON object put into a request's `kv_transfer_params`."""
        return {"kvferry": msgspec.to_builtins(self)}


def ticket_from_params(params: Any) -> HandoffTicket | None:
    """The ticket inside a request's `kv_transfer_params`, or None where there is none.

    Raises:
        msgspec.ValidationError: the object is there but is no ticket.
    """
    if not isinstance(params, dict) or "kvferry" not in params:
        return None
    return msgspec.convert(params["kvferry"], HandoffTicket)


class Outcome(msgspec.Struct, frozen=True):
    """How a handoff ended at the target, as reported to the router and to the client.

    `tokens_computed` counts the prompt tokens that the target prefilled itself.
    """

    handoff: HandoffId
    state: TerminalState
    stage: Stage | None = None
    cause: str | None = None
    detail: str | None = None
    tokens_computed: int = 0
    bytes_moved: int = 0
    duration_s: float = 0.0
    transport: str | None = None
    attempt: int = 0

    def as_header(self) -> str:
        """One line for the header `x-kvferry-outcome` and the SSE comment, such as `recomputed; stage=waiting`."""
        parts = [str(self.state)]
        parts += [f"{k}={v}" for k, v in (("stage", self.stage), ("cause", self.cause)) if v]
        parts += [f"tokens_computed={self.tokens_computed}", f"bytes={self.bytes_moved}"]
        parts += [f"handoff={self.handoff}"]
        return "; ".join(parts)
