"""One client request from its arrival to its end: carries out what the machine says."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from kvferry.errors import IntegrityError
from kvferry.policy.routing import Placement
from kvferry.router import steps
from kvferry.router.errors import error_body, error_event
from kvferry.router.first_token import Splice, may_stream
from kvferry.router.fleet import Target
from kvferry.router.http_messages import JSON, Sink
from kvferry.router.legs import DecodeLeg, PrefillLeg
from kvferry.router.machine import RequestMachine
from kvferry.router.metrics import RequestRecord
from kvferry.router.requests import ApiRequest, decode_body, prefill_body
from kvferry.router.surroundings import Surroundings
from kvferry.router.upstreams import Origin
from kvferry.types import HandoffId, HandoffTicket, Outcome, TerminalState, new_handoff_id

# After the KV has arrived, the prefill instance has this long to end its answer by itself.
PREFILL_GRACE_S = 5.0
DEFAULT_BLOCK_SIZE = 16
_PRINTABLE = bytes(b if 32 <= b < 127 else ord("?") for b in range(256))


class Exchange:
    """One request. Its end is `ended`, called exactly once."""

    def __init__(
        self,
        shared: Surroundings,
        request: ApiRequest,
        request_id: str,
        headers: bytes,
        sink: Sink,
        *,
        deadline_s: float,
        ended: Callable[[Exchange], None],
    ) -> None:
        self.request_id = request_id
        self.deadline_s = deadline_s
        self.arrived_s = time.monotonic()
        self.started = False
        self.prefill: PrefillLeg | None = None
        self.decode: DecodeLeg | None = None
        self.machine = RequestMachine(request_id, max_attempts=shared.attempts)
        self._shared = shared
        self._request = request
        self._headers = headers
        self._sink = sink
        self._ended = ended
        self._actions: deque[steps.Action] = deque()
        self._working = False
        self._placement: Placement | None = None
        self._targets: tuple[Target | None, Target] | None = None
        self._tickets: dict[HandoffId, tuple[int, Target, Target]] = {}
        self._handoff: HandoffId | None = None
        self._ticket_deadline_s = 0.0
        self._answer: DecodeLeg | None = None
        self._splice: Splice | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._taken: list[Target] = []
        self._placed_s: float | None = None
        self._prefilled_s: float | None = None
        self._verdict_s: float | None = None
        self._first_byte_s: float | None = None
        self._status = 0
        sink.listener = self

    @property
    def handoff(self) -> HandoffId | None:
        """The current attempt's handoff."""
        return self._handoff

    @property
    def handoff_remaining_s(self) -> float:
        """Seconds that the current attempt's handoff has left."""
        return max(0.0, self._ticket_deadline_s - time.monotonic())

    def begin(self) -> None:
        """Place the request and open its legs."""
        self.started = True
        self._actions.extend(self.machine.start())
        self._work()

    def handle(self, event: steps.Event) -> None:
        """Take an event from a leg, the client, a timer or the router."""
        if isinstance(event, steps.PrefillEnded | steps.PrefillFailed):
            self._prefilled_s = time.monotonic()
            if self.prefill is not None:
                self._release(self.prefill.target)
            self.prefill = None
        elif isinstance(event, steps.DecodeEnded):
            self._answer = self.decode
            if self._splice is not None and not self._splice.done:
                cause = f"http_{event.status}" if event.status >= 400 else "first_token_differs"
                detail = "the decode instance did not come to the token that the client has"
                event = steps.DecodeFailed(event.attempt, steps.Failure(cause, detail))
        self._actions.extend(self.machine.handle(event))
        self._work()

    def outcome(self, outcome: Outcome) -> None:
        """A target reported on one of this request's handoffs."""
        attempt, prefill, decode = self._tickets[outcome.handoff]
        if self.machine.prefill_failure is None:
            self._shared.fleet.note_outcome(prefill.ref, decode.ref, outcome, time.monotonic())
        if outcome.handoff == self._handoff:
            self._verdict_s = time.monotonic()
        self.handle(steps.OutcomeArrived(attempt, outcome))

    def check(self, now_s: float, stall_s: float) -> None:
        """Called every now and then: the deadline, and a decode instance that fell silent."""
        if now_s > self.deadline_s:
            self.handle(steps.DeadlinePassed("deadline", "the request's deadline passed", 504))
            return
        # A silent prefill instance needs no look: the target has its own lease on it and its own deadline.
        fleet, decode = self._shared.fleet, self.decode
        if decode is not None and fleet.is_lost(decode.target.ref):
            # It may come back, as after a stop; but where another one can do the work, waiting is pointless.
            name = decode.target.ref.instance_id
            begun = decode.forwarding or self._splice is not None
            replaceable = not begun and fleet.has_decode_beside(name)
            if replaceable or now_s - decode.last_byte_s > stall_s:
                self._close(decode)
                self.handle(steps.DecodeFailed(self.machine.attempt, steps.Failure("peer_gone", f"{name} fell silent")))

    # ClientListener

    def client_gone(self) -> None:
        self.handle(steps.ClientGone())

    def client_paused(self) -> None:
        if self.decode is not None and self.decode.call is not None:
            self.decode.call.pause()

    def client_resumed(self) -> None:
        if self.decode is not None and self.decode.call is not None:
            self.decode.call.resume()

    # Called by the legs

    def forward(self, data: bytes) -> None:
        leg = self.decode
        if self._splice is not None and not self._splice.done and leg is not None:
            try:
                data = self._splice.feed(data)
            except IntegrityError as error:
                self._close(leg)
                failure = steps.Failure("first_token_differs", error.message)
                self.handle(steps.DecodeFailed(self.machine.attempt, failure))
                return
        if data:
            self._sink.write(data)

    def done_seen(self) -> None:
        """The stream's `[DONE]` is there; its end should be, too, but is not waited for at length."""
        if self._timer is None and self.decode is not None and self.machine.state is steps.State.FORWARDING:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._shared.outcome_wait_s, self.decode.end)

    # Actions

    def _work(self) -> None:
        if self._working:
            return
        self._working = True
        try:
            while self._actions:
                self._perform(self._actions.popleft())
        finally:
            self._working = False

    def _perform(self, action: steps.Action) -> None:
        match action:
            case steps.Place():
                self._place(action)
            case steps.OpenLegs():
                self._open_legs(action.attempt, action.with_prefill)
            case steps.CloseLegs():
                self._close_legs()
            case steps.ReleasePrefill():
                self._release_prefill()
            case steps.Forward():
                self._start_forwarding()
            case steps.ForwardFirst():
                self._forward_first()
            case steps.ForwardRest():
                self._forward_rest()
            case steps.AwaitOutcome():
                self._await_outcome(action.attempt)
            case steps.Deliver():
                self._deliver()
            case steps.Refuse():
                self._refuse(action.status)
            case steps.BreakOff():
                self._break_off()
            case steps.Finish():
                self._finish()

    def _place(self, action: steps.Place) -> None:
        fleet = self._shared.fleet
        now_s = time.monotonic()
        if action.attempt > 0:
            self._shared.metrics.failovers.inc()
        placement = fleet.place(
            self._request.model, now_s, excluded=action.excluded, direct_reason=self._request.direct_reason
        )
        if placement is None or (action.pair_only and placement.prefill is None):
            what = f"model {self._request.model}" if self._request.model else "this request"
            failed = f" (failed already: {', '.join(sorted(action.excluded))})" if action.excluded else ""
            self._actions.extend(self.machine.handle(steps.Unplaced(f"no instance can decode {what} now{failed}")))
            return
        self._placement = placement
        prefill = fleet.target(placement.prefill) if placement.prefill is not None else None
        targets = (prefill, fleet.target(placement.decode))
        self._placed_s = self._placed_s or now_s
        name = placement.prefill.instance_id if placement.prefill is not None else None
        placed = steps.Placed(placement.decode.instance_id, name, placement.reason)
        self._actions.extend(self.machine.handle(placed))
        self._targets = targets

    def _open_legs(self, attempt: int, with_prefill: bool) -> None:
        assert self._targets is not None
        prefill, decode = self._targets
        request = self._request
        ticket = None
        self._handoff = None
        self._verdict_s = self._prefilled_s = None
        if with_prefill and prefill is not None:
            remaining_s = min(self._shared.handoff_deadline_s, self.deadline_s - time.monotonic())
            self._handoff = new_handoff_id()
            self._ticket_deadline_s = time.monotonic() + remaining_s
            self._tickets[self._handoff] = (attempt, prefill, decode)
            self._shared.handoffs[self._handoff] = self
            source = HandoffTicket(self._handoff, "source", prefill.ref, decode.ref, remaining_s, attempt)
            ticket = HandoffTicket(self._handoff, "target", prefill.ref, decode.ref, remaining_s, attempt)
            stream = self._shared.stream_first_token and may_stream(request)
            leg = self.prefill = PrefillLeg(self, attempt, prefill, stream=stream)
            body = prefill_body(request, source, stream=stream)
            self._take(prefill)
            leg.call = self._shared.pool.call(prefill.origin, self._head(prefill.origin, body), body, leg)
        body = decode_body(request, ticket)
        answer = self.decode = DecodeLeg(self, attempt, decode, stream=request.stream)
        self._take(decode)
        answer.call = self._shared.pool.call(decode.origin, self._head(decode.origin, body), body, answer)

    def _head(self, origin: Origin, body: bytes) -> bytes:
        return b"POST %b HTTP/1.1\r\nhost: %b\r\ncontent-length: %d\r\n%b\r\n" % (
            (origin.prefix + self._request.endpoint).encode(),
            str(origin).encode(),
            len(body),
            self._headers,
        )

    def _take(self, target: Target) -> None:
        self._shared.fleet.took(target.ref.instance_id)
        self._taken.append(target)

    def _release(self, target: Target) -> None:
        self._taken.remove(target)
        self._shared.fleet.released(target.ref.instance_id)

    def _close_legs(self) -> None:
        for leg in (self.prefill, self.decode):
            if leg is not None:
                self._close(leg)
        self.prefill = self.decode = None
        for target in list(self._taken):
            self._release(target)
        self._stop_timer()

    def _close(self, leg: PrefillLeg | DecodeLeg) -> None:
        if leg.call is not None:
            leg.call.cancel()

    def _release_prefill(self) -> None:
        leg = self.prefill
        self.prefill = None
        self._close_legs()
        if leg is not None and leg.call is not None:
            asyncio.get_running_loop().call_later(PREFILL_GRACE_S, leg.call.cancel)

    def _start_forwarding(self) -> None:
        leg = self._answer = self.decode
        assert leg is not None
        self._first_byte_s = time.monotonic()
        self._status = leg.status
        leg.forwarding = True
        self._sink.start(leg.status, [*leg.headers, self._id_header])
        self._sink.write(leg.take_held())

    def _forward_first(self) -> None:
        prefill = self.prefill
        assert prefill is not None and prefill.first is not None
        self._answer, self._splice = self.decode, Splice(prefill.first)
        self._first_byte_s = time.monotonic()
        self._status = 200
        self._sink.start(200, [*prefill.headers, self._id_header])
        self._sink.write(prefill.first.events)

    def _forward_rest(self) -> None:
        leg = self.decode
        assert leg is not None
        leg.forwarding = True
        self.forward(leg.take_held())

    def _await_outcome(self, attempt: int) -> None:
        self._stop_timer()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._shared.outcome_wait_s, self.handle, steps.OutcomeOverdue(attempt))

    def _deliver(self) -> None:
        leg = self.decode or self._answer
        assert leg is not None
        self._status = leg.status
        header = self._verdict_text()
        if leg.forwarding or leg.streamed:
            if not leg.forwarding:
                self._start_forwarding()
            last = b""
            if leg.events is not None:
                rest = leg.events.rest()
                comment = b": kvferry-outcome %b\n\n" % header
                last = rest + b"\n\n" + comment if leg.events.mid_event else comment + rest
            self._sink.finish(last)
        else:
            headers = [*leg.headers, self._id_header, (b"x-kvferry-outcome", header)]
            self._first_byte_s = time.monotonic()
            self._sink.start(leg.status, headers, leg.take_held())
            self._sink.finish()

    def _refuse(self, status: int) -> None:
        verdict = self.machine.verdict
        assert verdict is not None
        self._status = status
        headers = [JSON, self._id_header, (b"x-kvferry-outcome", self._verdict_text())]
        if status in (429, 503):
            headers.append((b"retry-after", b"%d" % self._shared.retry_after_s()))
        message = verdict.detail or verdict.cause or "the request failed"
        self._sink.start(status, headers, error_body(status, message, code=verdict.cause))
        self._sink.finish()

    def _break_off(self) -> None:
        verdict, leg = self.machine.verdict, self._answer
        assert verdict is not None and leg is not None
        if leg.events is None and self._splice is None:
            # Not a stream of events: only a cut connection can tell the client that this is not all.
            self._sink.abort()
            return
        end_of_event = b"\n\n" if leg.events is not None and leg.events.mid_event else b""
        comment = b": kvferry-outcome %b\n\n" % self._verdict_text()
        event = error_event(502, verdict.detail or "the instance failed", code=verdict.cause)
        self._sink.finish(end_of_event + comment + event)

    def _finish(self) -> None:
        self._stop_timer()
        self._sink.listener = None
        for handoff in self._tickets:
            self._shared.handoffs.pop(handoff, None)
        self._shared.metrics.request_ended(self._record(), expected_tokens=self._expected_tokens())
        self._ended(self)

    def _expected_tokens(self) -> int:
        """Prompt tokens that a target computes even when the KV arrives: what is left beyond its last whole block."""
        fingerprint = self._placement.decode.fingerprint if self._placement is not None else None
        return fingerprint.block_size if fingerprint is not None else DEFAULT_BLOCK_SIZE

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _id_header(self) -> tuple[bytes, bytes]:
        return (b"x-request-id", self.request_id.encode())

    def _verdict_text(self) -> bytes:
        """The verdict for a header or a comment: one line of printable ASCII, whatever the instance reported."""
        verdict = self.machine.verdict
        assert verdict is not None
        return verdict.as_header().encode("ascii", "replace").translate(_PRINTABLE)

    def _record(self) -> RequestRecord:
        verdict, placed = self.machine.verdict, self.machine.placed
        assert verdict is not None
        now_s = time.monotonic()
        stages = {"queue": (self._placed_s or now_s) - self.arrived_s}
        if self._placed_s is not None and self._prefilled_s is not None:
            stages["prefill"] = self._prefilled_s - self._placed_s
            if self._verdict_s is not None:
                stages["handoff"] = max(0.0, self._verdict_s - self._prefilled_s)
        if self._first_byte_s is not None:
            stages["decode"] = now_s - self._first_byte_s
        outcome = verdict.outcome
        aborted = verdict.state is TerminalState.ABORTED
        return RequestRecord(
            request=self.request_id,
            state=verdict.state,
            path=verdict.path,
            status=499 if aborted else self._status,
            stage=verdict.stage,
            cause=verdict.cause,
            detail=verdict.detail,
            model=self._request.model,
            stream=self._request.stream,
            prefill=placed.prefill if placed is not None else None,
            decode=placed.decode if placed is not None else None,
            handoff=self._handoff,
            attempts=self.machine.attempt + 1 if placed is not None else 0,
            stages=stages,
            ttft_s=self._first_byte_s - self.arrived_s if self._first_byte_s is not None else None,
            total_s=now_s - self.arrived_s,
            handoff_s=outcome.duration_s if outcome is not None else None,
            handoff_bytes=outcome.bytes_moved if outcome is not None else 0,
            transport=outcome.transport if outcome is not None else None,
            tokens_computed=outcome.tokens_computed if outcome is not None else 0,
        )
