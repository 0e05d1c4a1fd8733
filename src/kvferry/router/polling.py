"""Instances that somebody else started and that do not register: their health is asked for, again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from kvferry.errors import ConfigError, KVError, TransferTimeout
from kvferry.observe import get_log
from kvferry.protocol.membership import InstanceReport
from kvferry.router.fleet import Fleet
from kvferry.router.upstreams import Call, Origin, UpstreamPool
from kvferry.types import Role

_log = get_log("kvferry.router")
MAX_ANSWER_BYTES = 1 << 20


class StaticUpstream(msgspec.Struct, frozen=True):
    """One instance from the command line. Without `addresses` no handoff can start from it."""

    role: Role
    url: str
    addresses: tuple[str, ...] = ()

    @property
    def instance_id(self) -> str:
        return f"{self.role}-{Origin.of(self.url)}"


def parse_upstreams(role: Role, values: Sequence[str]) -> list[StaticUpstream]:
    """Read `URL` or `URL,handoff=tcp://host:port[,handoff=...]` (one handoff listener for each rank).

    The settings cut lists at commas, so that an item may also be the rest of the one before it.

    Raises: ConfigError for what is neither.
    """
    found: list[StaticUpstream] = []
    for item in (part.strip() for value in values for part in value.split(",")):
        if item.startswith("handoff=") and found:
            last = found[-1]
            found[-1] = msgspec.structs.replace(last, addresses=(*last.addresses, item.removeprefix("handoff=")))
        elif item.startswith("handoff="):
            raise ConfigError(f"router.{role}: {item!r} follows no URL; expected URL,handoff=tcp://host:port")
        elif item:
            origin = Origin.of(item)
            # One name for one instance: an instance that registers as 127.0.0.1 shall take this entry's place.
            host = "127.0.0.1" if origin.host == "localhost" else origin.host
            found.append(StaticUpstream(role, f"http://{origin._replace(host=host)}{origin.prefix}"))
    return found


async def poll_upstreams(
    upstreams: Sequence[StaticUpstream], fleet: Fleet, pool: UpstreamPool, *, every_s: float
) -> None:
    """Keep the live ones in the fleet, until cancelled."""
    for upstream in upstreams:
        if upstream.role == "prefill" and not upstream.addresses:
            _log.warning(
                "no handoffs from this instance until it registers: its listener is not known",
                instance=upstream.instance_id,
                expected="URL,handoff=tcp://host:port",
            )
    async with asyncio.TaskGroup() as group:
        for upstream in upstreams:
            group.create_task(_poll(upstream, fleet, pool, every_s))


async def _poll(upstream: StaticUpstream, fleet: Fleet, pool: UpstreamPool, every_s: float) -> None:
    origin = Origin.of(upstream.url)
    names: list[str] = []
    while True:
        if not any(m.report.url == upstream.url and not m.polled for m in fleet.membership):
            try:
                status, _ = await fetch(pool, origin, "/health", timeout_s=max(every_s, 2.0))
                if status == 200 and not names:
                    names = _model_names(*await fetch(pool, origin, "/v1/models", timeout_s=max(every_s, 2.0)))
                if status == 200:
                    _report(upstream, fleet, names)
                else:
                    names = []
            except KVError as error:
                names = []
                _log.debug("instance does not answer", instance=upstream.instance_id, why=str(error))
        await asyncio.sleep(every_s)


def _report(upstream: StaticUpstream, fleet: Fleet, names: list[str]) -> None:
    report = InstanceReport(
        instance_id=upstream.instance_id,
        incarnation=0,
        role=upstream.role,
        url=upstream.url,
        model=names[0] if names else "",
        addresses=upstream.addresses,
    )
    fleet.report(report, time.monotonic(), polled=True)
    fleet.name_models(upstream.instance_id, frozenset(names[1:]))


def _model_names(status: int, body: bytes) -> list[str]:
    try:
        cards: list[dict[str, Any]] = msgspec.json.decode(body, type=dict[str, Any])["data"] if status == 200 else []
        return [str(card["id"]) for card in cards]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return []


class _Collector:
    """Turns a call's callbacks into a future of (status, body)."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._body = bytearray()

    def call_head(self, call: Call, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status

    def call_body(self, call: Call, data: bytes) -> None:
        if len(self._body) < MAX_ANSWER_BYTES:
            self._body += data

    def call_ended(self, call: Call) -> None:
        if not self.answer.done():
            self.answer.set_result((self._status, bytes(self._body)))

    def call_failed(self, call: Call, error: KVError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


async def fetch(pool: UpstreamPool, origin: Origin, path: str, *, timeout_s: float) -> tuple[int, bytes]:
    """GET a small document.

    Raises: PeerGone, TransferTimeout, WireError.
    """
    collector = _Collector()
    head = f"GET {origin.prefix}{path} HTTP/1.1\r\nhost: {origin}\r\n\r\n".encode()
    call = pool.call(origin, head, b"", collector)
    try:
        async with asyncio.timeout(timeout_s):
            return await collector.answer
    except TimeoutError as error:
        raise TransferTimeout(f"{origin}{path} did not answer within {timeout_s:g} s", peer=str(origin)) from error
    finally:
        call.cancel()
