"""The vLLM instance's entry in the router's table, and its outcomes. Lives with the scheduler half. No vLLM import."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from kvferry.handoff.membership import RouterClient
from kvferry.layout import Fingerprint
from kvferry.protocol.membership import InstanceReport
from kvferry.types import Outcome, Role

POLL_S = 0.2
POLL_TIMEOUT_S = 2.0


@dataclass
class InstanceState:
    """What changes from heartbeat to heartbeat. Written by the scheduler's thread, read by the heartbeat's."""

    running: int = 0
    step: int = 0
    num_blocks: int = 0
    free_blocks: Callable[[], int] = lambda: 0


class Registration:
    """Joins the router once the ranks' addresses are known. Without a router all calls do nothing."""

    def __init__(
        self,
        *,
        router: str | None,
        secret: bytes | None,
        url: str,
        instance_id: str,
        incarnation: int,
        role: Role,
        model: str,
        version: str,
        fingerprint: Fingerprint,
    ) -> None:
        self.state = InstanceState()
        self._closing = threading.Event()
        self._addresses: tuple[str, ...] = ()
        self._url, self._instance_id, self._incarnation = url, instance_id, incarnation
        self._role, self._model, self._version, self._fingerprint = role, model, version, fingerprint
        self._client = RouterClient(router, secret, self.report) if router is not None else None

    def join(self, addresses: tuple[str, ...]) -> None:
        """Register with these addresses, one for each rank, as soon as this server answers. Returns at once."""
        self._addresses = addresses
        if self._client is not None:
            threading.Thread(target=self._join_when_serving, name="kvferry-join", daemon=True).start()

    def _join_when_serving(self) -> None:
        # The engine is up some time before its HTTP server is: a router that knew it now would send into the void.
        while not self._closing.wait(POLL_S):
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=POLL_TIMEOUT_S):
                    break
            except OSError:
                continue
        if self._client is not None and not self._closing.is_set():
            self._client.start()

    def report(self) -> InstanceReport:
        """The instance as the router shall see it now."""
        return InstanceReport(
            instance_id=self._instance_id,
            incarnation=self._incarnation,
            role=self._role,
            url=self._url,
            model=self._model,
            addresses=self._addresses,
            fingerprint=self._fingerprint,
            engine="vllm",
            version=self._version,
            num_blocks=self.state.num_blocks,
            free_blocks=self.state.free_blocks(),
            running=self.state.running,
            step=self.state.step,
        )

    def report_outcome(self, outcome: Outcome) -> None:
        """Tell the router how a handoff ended here."""
        if self._client is not None:
            self._client.report_outcome(outcome)

    def close(self) -> None:
        """Leave the router's table."""
        self._closing.set()
        if self._client is not None:
            self._client.close()
