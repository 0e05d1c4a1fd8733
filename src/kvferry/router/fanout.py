"""A request for several prompts, served as one request for each: every prompt has a handoff of its own.

The answers are merged into one: choices in the order of the prompts, usage summed. The first part that fails ends
all of it, with that part's own answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kvferry.router.errors import error_body
from kvferry.router.http_messages import JSON, ClientListener, Sink
from kvferry.router.requests import ApiRequest, merge_answers

PARTS_AT_ONCE = 16
Headers = Sequence[tuple[bytes, bytes]]
Submit = Callable[[ApiRequest, str, Sink], None]


class _Part:
    """Collects the answer to one prompt."""

    def __init__(self, done: Callable[[_Part], None]) -> None:
        self.listener: ClientListener | None = None
        self.started = False
        self.status = 0
        self.headers: Headers = ()
        self._done = done
        self._body: list[bytes] = []

    @property
    def body(self) -> bytes:
        return b"".join(self._body)

    def start(self, status: int, headers: Headers, body: bytes | None = None) -> None:
        self.started = True
        self.status, self.headers = status, headers
        self.write(body or b"")

    def write(self, data: bytes) -> None:
        self._body.append(data)

    def finish(self, last: bytes = b"") -> None:
        self.write(last)
        self._done(self)

    def abort(self) -> None:
        self.status = 502
        self._body = [error_body(502, "an instance broke off its answer to one of the prompts")]
        self._done(self)


class Fanout:
    """Runs the parts, at most `PARTS_AT_ONCE` at a time, and answers once."""

    def __init__(self, request: ApiRequest, request_id: str, sink: Sink, submit: Submit) -> None:
        self._request = request
        self._request_id = request_id
        self._sink = sink
        self._submit = submit
        self._parts = [_Part(self._part_done) for _ in request.prompts]
        self._next = 0
        self._num_done = 0
        self._over = False
        sink.listener = self

    def begin(self) -> None:
        """Start the first parts; each one that ends starts the next."""
        for _ in range(min(PARTS_AT_ONCE, len(self._parts))):
            self._start_next()

    def client_gone(self) -> None:
        self._over = True
        self._abort_parts()

    def client_paused(self) -> None:
        """Nothing flows before the end."""

    def client_resumed(self) -> None:
        """Nothing flows before the end."""

    def _start_next(self) -> None:
        at = self._next
        if self._over or at >= len(self._parts):
            return
        self._next += 1
        request = self._request.part(self._request.prompts[at])
        self._submit(request, f"{self._request_id}-{at}", self._parts[at])

    def _part_done(self, part: _Part) -> None:
        part.listener = None
        self._num_done += 1
        if self._over:
            return
        if part.status >= 400:
            self._answer(part.status, part.headers, part.body)
            self._abort_parts()
        elif self._num_done == len(self._parts):
            self._merge()
        else:
            self._start_next()

    def _merge(self) -> None:
        bodies = [part.body for part in self._parts]
        try:
            body = merge_answers(bodies)
        except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as error:
            self._answer(502, [JSON], error_body(502, f"an instance's answer is no completion ({error})"))
            return
        first = [h for h in self._parts[0].headers if h[0] not in (b"x-request-id", b"x-kvferry-outcome")]
        outcomes = [v for part in self._parts for k, v in part.headers if k == b"x-kvferry-outcome"]
        named = (b"x-request-id", self._request_id.encode())
        self._answer(200, [*first, named, (b"x-kvferry-outcome", b", ".join(outcomes))], body)

    def _answer(self, status: int, headers: Headers, body: bytes) -> None:
        self._over = True
        self._sink.listener = None
        self._sink.start(status, headers, body)
        self._sink.finish()

    def _abort_parts(self) -> None:
        for part in self._parts:
            listener, part.listener = part.listener, None
            if listener is not None:
                listener.client_gone()
