"""What the way through a router does to a request and its answer.

The probe registers two stand-in instances at the router, under a model name that nobody else asks for, and sends
requests for that model through the URL it was given: so it knows on both ends what should have passed. A proxy that
takes no registrations (vLLM's toy proxy, a gateway) is asked for what it serves, and only what can be told from
outside is told.
"""

from __future__ import annotations

import http.client
import secrets
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgspec

from kvferry.doctor.asking import connect, ended_after, open_http
from kvferry.doctor.echo import BAD_REQUEST_STATUS, LONG, PAUSE_S, TEXT, EchoServer, script
from kvferry.doctor.facts import RouterProbe
from kvferry.layout import Fingerprint
from kvferry.protocol.membership import InstanceReport
from kvferry.types import Outcome, Role, TerminalState, new_incarnation, ticket_from_params
from kvferry.wire import sign_http

REQUEST_S = 20.0
CONNECT_S = 3.0
BUFFERED_SHARE = 0.3
OUTSIDE_TOKENS = 192
MIN_DECODING_S = 0.3
_INSTANCES = "/kvferry/v1/instances"
_REPLACEMENT = "\ufffd"


class _Unusable(Exception):
    """The URL cannot be probed."""


def probe_passage(url: str, secret: bytes | None = None) -> RouterProbe:
    """Probe the way through `url`. Never raises: what could not be done is in `failure`."""
    url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
    try:
        with _stand_ins(url, secret) as (echo, model, note):
            if echo is None:
                return _from_outside(url, note)
            return _through(url, model, echo)
    except _Unusable as e:
        return RouterProbe(url, failure=str(e))


@contextmanager
def _stand_ins(url: str, secret: bytes | None) -> Iterator[tuple[EchoServer | None, str, str]]:
    """Two registered stand-ins, their model, and why there are none where the URL takes no registrations."""
    tag = secrets.token_hex(4)
    model = f"kvferry-doctor-{tag}"
    fingerprint = Fingerprint(model, "float32", 16, 1, 1, 8)
    incarnation = int(new_incarnation())
    with EchoServer(_own_address(url), lambda request: _report(url, request, secret)) as echo:
        names: list[str] = []
        try:
            roles: tuple[Role, ...] = ("prefill", "decode")
            for role in roles:
                report = InstanceReport(
                    instance_id=f"{model}-{role}",
                    incarnation=incarnation,
                    role=role,
                    url=echo.url,
                    model=model,
                    addresses=("tcp://127.0.0.1:9",),
                    fingerprint=fingerprint,
                    engine="doctor",
                    num_blocks=1 << 16,
                    free_blocks=1 << 16,
                )
                status, _ = _call(url, "POST", _INSTANCES, msgspec.json.encode(report), secret)
                if status != 200:
                    why = "it asks for the cluster secret" if status == 401 else f"it answered {status}"
                    yield None, model, f"seen from outside only, no stand-ins could register: {why}"
                    return
                names.append(report.instance_id)
            yield echo, model, ""
        finally:
            for name in names:
                path = f"{_INSTANCES}/{name}?incarnation={incarnation}"
                try:
                    _call(url, "DELETE", path, b"", secret)
                except _Unusable:
                    pass  # It expires by itself within seconds.


def _report(url: str, request: dict[str, Any], secret: bytes | None) -> None:
    """Tell the router that this handoff was delivered, as an instance would, so that its counts stay true."""
    try:
        ticket = ticket_from_params(request.get("kv_transfer_params"))
        if ticket is not None:
            outcome = Outcome(ticket.handoff, TerminalState.DELIVERED, transport="probe", attempt=ticket.attempt)
            _call(url, "POST", "/kvferry/v1/outcomes", msgspec.json.encode([outcome]), secret)
    except (_Unusable, msgspec.ValidationError):
        pass  # What got lost on the way shows in the findings.


def _through(url: str, model: str, echo: EchoServer) -> RouterProbe:
    nonce = secrets.token_hex(8)
    request = {"model": model, "prompt": f"probe {TEXT}", "max_tokens": 64, "stream": True, "kvferry_probe": nonce}
    status, body, times = _stream(url, request)
    if status != 200:
        raise _Unusable(f"a probe request was answered {status}: {body[:200].decode(errors='replace')}")
    got = [r for r in echo.requests if r.get("max_tokens") != 1]
    kept = bool(got) and got[-1].get("kvferry_probe") == nonce and bool(got[-1].get("kv_transfer_params"))
    mangled = _difference(b"".join(script()), body)
    prompt_kept = bool(got) and got[-1].get("prompt") == request["prompt"]
    if not mangled and not prompt_kept:
        seen = str(got[-1].get("prompt")) if got else "nothing"
        mangled = f"the prompt {request['prompt']!r} arrived as {seen[:80]!r}"
    buffered_s = _buffered(times, echo.sent_s or len(script()) * PAUSE_S)
    if buffered_s is not None:
        # Once more: a machine that stood still for a moment looks like this once, a buffer every time.
        _, _, times = _stream(url, request)
        buffered_s = _buffered(times, echo.sent_s or len(script()) * PAUSE_S)
    status, _, _ = _stream(url, {"model": model, "prompt": "bad", "max_tokens": 64, "stream": False})
    return RouterProbe(
        url,
        mangled=mangled,
        buffered_s=buffered_s,
        dropped_params=not kept,
        status_change=None if status == BAD_REQUEST_STATUS else (BAD_REQUEST_STATUS, status),
    )


def _from_outside(url: str, note: str) -> RouterProbe:
    """What a client sees: does an error keep its status and its bytes, does a stream come as it is made?"""
    status, body, _ = _stream(url, {"model": LONG, "prompt": "x", "max_tokens": 1})
    change = (404, status) if status >= 500 else None
    mangled = ""
    text = body.decode(errors="replace")
    if _REPLACEMENT in text and LONG[:2] in text:
        at = text.index(_REPLACEMENT)
        mangled = f"an error that quotes the request came back with U+FFFD at character {at}: {text[at - 4 : at + 4]!r}"
    return RouterProbe(url, mangled=mangled, buffered_s=_stream_from_outside(url), status_change=change, note=note)


def _stream_from_outside(url: str) -> float | None:
    """How long the stream of a real answer was held back; None where it was not, or where that cannot be told."""
    status, body = _call(url, "GET", "/v1/models", b"", None)
    try:
        model = msgspec.json.decode(body)["data"][0]["id"] if status == 200 else ""
    except (msgspec.DecodeError, LookupError, TypeError):
        return None
    request = {"model": model, "prompt": "Count: 1 2 3 4", "stream": True, "ignore_eos": True}
    status, _, first = _stream(url, {**request, "max_tokens": 1})
    if status != 200 or not first:
        return None
    status, _, times = _stream(url, {**request, "max_tokens": OUTSIDE_TOKENS})
    if status != 200 or not times:
        return None
    decoding = times[-1] - first[-1]
    held = decoding > MIN_DECODING_S and times[0] - first[-1] > (1 - BUFFERED_SHARE) * decoding
    return round(decoding, 3) if held else None


def _difference(sent: bytes, got: bytes) -> str:
    """Where the events that arrived differ from those sent; comments and empty lines do not count."""
    a, b = _events(sent), _events(got)
    if a == b:
        return ""
    for i, event in enumerate(a):
        there = b[i] if i < len(b) else b""
        if event != there:
            at = next((k for k, (x, y) in enumerate(zip(event, there, strict=False)) if x != y), len(there))
            return f"event {i + 1} differs at byte {at}: sent {event[at : at + 12]!r}, got {there[at : at + 12]!r}"
    return f"{len(b) - len(a)} events more than were sent"


def _events(body: bytes) -> list[bytes]:
    return [x for x in body.replace(b"\r\n", b"\n").split(b"\n") if x and not x.startswith(b":")]


def _buffered(times: list[float], sent_s: float) -> float | None:
    """How long the sender took, if all of it arrived in a fraction of that time at the end."""
    if len(times) < 1 or sent_s < 3 * PAUSE_S:
        return None
    spread = times[-1] - times[0]
    return round(sent_s, 3) if spread < BUFFERED_SHARE * sent_s and times[0] > (1 - BUFFERED_SHARE) * sent_s else None


def _stream(url: str, request: dict[str, Any]) -> tuple[int, bytes, list[float]]:
    """(status, body, seconds from the request at which each part of the body came)."""
    times: list[float] = []
    started = time.monotonic()

    def read(answer: http.client.HTTPResponse) -> bytes:
        parts = []
        while part := answer.read1(65536):
            times.append(time.monotonic() - started)
            parts.append(part)
        return b"".join(parts)

    status, body = _exchange(url, "POST", "/v1/completions", msgspec.json.encode(request), None, read)
    return status, body, times


def _call(url: str, method: str, path: str, body: bytes, secret: bytes | None) -> tuple[int, bytes]:
    return _exchange(url, method, path, body, secret, lambda answer: answer.read())


def _exchange(
    url: str,
    method: str,
    path: str,
    body: bytes,
    secret: bytes | None,
    read: Callable[[http.client.HTTPResponse], bytes],
) -> tuple[int, bytes]:
    headers = {"content-type": "application/json"}
    if secret is not None:
        headers["x-kvferry-auth"] = sign_http(secret, method, path, body)
    try:
        connection = open_http(url, CONNECT_S)
    except (OSError, ValueError) as e:
        raise _Unusable(f"cannot connect: {e}") from e
    connection.sock.settimeout(REQUEST_S)
    with closing(connection), ended_after(connection.sock, REQUEST_S) as late:
        try:
            connection.request(method, urllib.parse.urlsplit(url).path.rstrip("/") + path, body, headers)
            answer = connection.getresponse()
            whole = read(answer)
        except (OSError, ValueError, http.client.HTTPException) as e:
            why = f"none that ended within {REQUEST_S:.0f} s" if late.is_set() else e or type(e).__name__
            raise _Unusable(f"{method} {path} got no answer: {why}") from e
    if late.is_set():
        raise _Unusable(f"{method} {path} got no answer that ended within {REQUEST_S:.0f} s")
    return answer.status, whole


def _own_address(url: str) -> str:
    """The address of this machine that the router reaches."""
    try:
        parts = urllib.parse.urlsplit(url)
        with connect(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), CONNECT_S) as s:
            return str(s.getsockname()[0])
    except (OSError, ValueError) as e:
        raise _Unusable(f"cannot connect: {e}") from e
