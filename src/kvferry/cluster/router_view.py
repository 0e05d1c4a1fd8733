"""What a running router says about its instances and requests."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

import aiohttp
import msgspec

from kvferry.errors import PeerGone, WireError
from kvferry.types import Role, Side, TerminalState

INSTANCES_PATH = "/kvferry/v1/instances"
REQUESTS_PATH = "/debug/handoffs"
_TIMEOUT = aiohttp.ClientTimeout(total=3.0)
_Answer = TypeVar("_Answer")


class InstanceRow(msgspec.Struct, frozen=True):
    """One instance in the router's table. `silent_s` counts from its last report, `mismatches` name what differs."""

    instance_id: str
    role: Role
    url: str
    model: str
    engine: str = ""
    num_blocks: int = 0
    free_blocks: int = 0
    running: int = 0
    waiting: int = 0
    silent_s: float = 0.0
    age_s: float = 0.0
    stuck: bool = False
    mismatches: list[str] = []


class OpenRequest(msgspec.Struct, frozen=True):
    """One request that the router has in hand."""

    request: str
    state: str
    stage: str
    age_s: float
    remaining_s: float | None = None
    prefill: str | None = None
    decode: str | None = None
    handoff: str | None = None


class EndedRequest(msgspec.Struct, frozen=True):
    """One request that has ended. `stages` are seconds in queue, prefill, handoff and decode, where it had them."""

    request: str
    state: TerminalState
    stage: str | None = None
    cause: str | None = None
    detail: str | None = None
    prefill: str | None = None
    decode: str | None = None
    handoff: str | None = None
    stages: dict[str, float] = {}
    ttft_s: float | None = None
    total_s: float = 0.0
    handoff_s: float | None = None
    handoff_bytes: int = 0
    transport: str | None = None
    tokens_computed: int = 0


class HandoffRow(msgspec.Struct, frozen=True):
    """One open handoff as one instance reported it, `reported_s` ago."""

    instance: str
    handoff: str
    side: Side
    stage: str
    age_s: float
    remaining_s: float
    peer: str = ""
    detail: str = ""
    reported_s: float = 0.0


class Requests(msgspec.Struct, frozen=True):
    """Open requests, open handoffs as the instances report them, and the latest ended requests, oldest first."""

    requests: list[OpenRequest] = []
    recent: list[EndedRequest] = []
    handoffs: list[HandoffRow] = msgspec.field(default_factory=list, name="instances")


class _Instances(msgspec.Struct, frozen=True):
    instances: list[InstanceRow] = []


class RouterView:
    """Reads a router's state over HTTP. An async context manager."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> RouterView:
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def is_ready(self) -> bool:
        """True when the router can serve a request now.

        Raises:
            PeerGone: no answer.
        """
        return (await self._get("/ready"))[0] == 200

    async def instances(self) -> list[InstanceRow]:
        """The router's table of instances.

        Raises:
            PeerGone: no answer, or not 200.
            WireError: an answer in another form.
        """
        return (await self._read(INSTANCES_PATH, _Instances)).instances

    async def requests(self) -> Requests:
        """Open and latest requests. Raises as `instances`."""
        return await self._read(REQUESTS_PATH, Requests)

    async def _read(self, path: str, form: type[_Answer]) -> _Answer:
        status, body = await self._get(path)
        if status != 200:
            raise PeerGone(f"the router at {self.url} answered {status} to {path}: {body[:200]!r}", peer=self.url)
        try:
            return msgspec.json.decode(body, type=form)
        except msgspec.MsgspecError as error:
            raise WireError(f"{path} of {self.url} can't be read: {error}; is it a kvferry router?") from error

    async def _get(self, path: str) -> tuple[int, bytes]:
        if self._session is None:
            raise RuntimeError("a RouterView is used as `async with RouterView(...)`")
        try:
            async with self._session.get(self.url + path) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
            raise PeerGone(f"no answer from the router at {self.url}: {why}; is it running?", peer=self.url) from error
