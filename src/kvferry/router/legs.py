"""The halves of an attempt: the prefill leg, whose answer is thrown away (but its token, where the router streams
that), and the decode leg, which is the answer.
"""

from __future__ import annotations

import time
from typing import Protocol

from kvferry.errors import KVError, WireError
from kvferry.router.errors import told_by
from kvferry.router.first_token import FirstToken, FirstTokenReader
from kvferry.router.fleet import Target
from kvferry.router.steps import (
    DecodeEnded,
    DecodeFailed,
    DecodeStarted,
    Event,
    Failure,
    FirstTokenCame,
    PrefillEnded,
    PrefillFailed,
)
from kvferry.router.streaming import EventStream
from kvferry.router.upstreams import Call

MAX_PREFILL_ANSWER_BYTES = 16 << 20
MAX_HELD_ANSWER_BYTES = 256 << 20
MAX_EXCERPT_BYTES = 4096
_REFUSED = (429, 503)
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"x-request-id",
    }
)

Headers = list[tuple[bytes, bytes]]


class Owner(Protocol):
    """The exchange, as its legs see it."""

    def handle(self, event: Event) -> None: ...
    def forward(self, data: bytes) -> None: ...
    def done_seen(self) -> None: ...


def _lost(target: Target, error: KVError, call: Call) -> Failure:
    return Failure(error.cause, f"{target.ref.instance_id}: {error.message}", call.taken)


def _for_client(headers: Headers) -> Headers:
    return [h for h in headers if h[0] not in _HOP_BY_HOP and not h[0].startswith(b"x-kvferry-")]


def _is_event_stream(headers: Headers) -> bool:
    return any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers)


class PrefillLeg:
    """Waits for the end of the prefill instance's answer; with `stream`, for its token before."""

    def __init__(self, owner: Owner, attempt: int, target: Target, *, stream: bool = False) -> None:
        self.target = target
        self.headers: Headers = []
        self.first: FirstToken | None = None
        self._events = EventStream() if stream else None
        self._reader = FirstTokenReader()
        self.call: Call | None = None
        self.started_s = time.monotonic()
        self._owner = owner
        self._attempt = attempt
        self._status = 0
        self._num_bytes = 0
        self._excerpt = b""

    def call_head(self, call: Call, status: int, headers: Headers) -> None:
        self._status, self.headers = status, _for_client(headers)
        if status != 200 or not _is_event_stream(headers):
            self._events = None

    def call_body(self, call: Call, data: bytes) -> None:
        if self._events is not None and not self._reader.over:
            self.first = self._reader.feed(self._events.feed(data))
            if self.first is not None:
                self._owner.handle(FirstTokenCame(self._attempt))
        self._num_bytes += len(data)
        if self._status >= 400 and len(self._excerpt) < MAX_EXCERPT_BYTES:
            self._excerpt += data[:MAX_EXCERPT_BYTES]
        if self._num_bytes > MAX_PREFILL_ANSWER_BYTES:
            call.cancel()
            self.call_failed(call, WireError("the prefill instance's answer has no end"))

    def call_ended(self, call: Call) -> None:
        if self._status < 400:
            self._owner.handle(PrefillEnded(self._attempt))
            return
        detail = f"{self.target.ref.instance_id} answered {self._status}: {told_by(self._excerpt)}"
        failure = Failure(f"http_{self._status}", detail, taken=self._status not in _REFUSED)
        self._owner.handle(PrefillFailed(self._attempt, failure))

    def call_failed(self, call: Call, error: KVError) -> None:
        self._owner.handle(PrefillFailed(self._attempt, _lost(self.target, error, call)))


class DecodeLeg:
    """Streams the answer through, or holds it until it is whole.

    A stream is held until its first event is complete, any other answer until its end: up to then, another instance
    can take over without the client noticing.
    """

    def __init__(self, owner: Owner, attempt: int, target: Target, *, stream: bool) -> None:
        self.target = target
        self.call: Call | None = None
        self.started_s = self.last_byte_s = time.monotonic()
        self.status = 0
        self.headers: Headers = []
        self.events: EventStream | None = None
        self.forwarding = False
        self._owner = owner
        self._attempt = attempt
        self._stream = stream
        self._streamed = False
        self._held: list[bytes] = []
        self._num_held = 0

    @property
    def streamed(self) -> bool:
        """Whether the answer goes through as it comes."""
        return self._streamed

    def call_head(self, call: Call, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = _for_client(headers)
        is_events = _is_event_stream(headers)
        self._streamed = status == 200 and (is_events or self._stream)
        if self._streamed and is_events:
            self.events = EventStream()

    def call_body(self, call: Call, data: bytes) -> None:
        self.last_byte_s = time.monotonic()
        if self.events is not None:
            data = self.events.feed(data)
        if self.forwarding:
            if data:
                self._owner.forward(data)
        elif data:
            self._hold(call, data)
        if self.events is not None and self.events.done:
            self._owner.done_seen()

    def _hold(self, call: Call, data: bytes) -> None:
        self._held.append(data)
        self._num_held += len(data)
        if self._streamed:
            self._owner.handle(DecodeStarted(self._attempt))
        elif self._num_held > MAX_HELD_ANSWER_BYTES:
            call.cancel()
            self.call_failed(call, WireError(f"the answer is larger than {MAX_HELD_ANSWER_BYTES} bytes"))

    def take_held(self) -> bytes:
        """What came before forwarding began, or the whole answer."""
        held, self._held = b"".join(self._held), []
        return held

    def end(self) -> None:
        """The answer counts as complete, though the instance has not closed it yet."""
        failed = self.events is not None and self.events.failed
        said = told_by(b"".join(self._held)[:MAX_EXCERPT_BYTES]) if self.status >= 400 else ""
        self._owner.handle(DecodeEnded(self._attempt, self.status, failed, said))

    def call_ended(self, call: Call) -> None:
        self.end()

    def call_failed(self, call: Call, error: KVError) -> None:
        if self.events is not None and self.events.done:
            # What broke off after the stream's own end is missed by nobody.
            self.end()
            return
        self._owner.handle(DecodeFailed(self._attempt, _lost(self.target, error, call)))
