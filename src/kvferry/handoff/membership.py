"""The instance's tie to the router: one thread registers, heartbeats, and reports how handoffs ended."""

from __future__ import annotations

import http.client
import logging
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable

import msgspec

from kvferry.errors import ConfigError
from kvferry.protocol.membership import InstanceReport, Lease
from kvferry.types import Outcome
from kvferry.wire import sign_http

INSTANCES_PATH = "/kvferry/v1/instances"
OUTCOMES_PATH = "/kvferry/v1/outcomes"
CALL_TIMEOUT_S = 2.0
RETRY_S = 0.2
OUTCOME_TRIES = 10
MAX_OUTCOMES = 10_000
MAX_OUTCOMES_A_CALL = 256
_log = logging.getLogger("kvferry.membership")


class RouterClient:
    """Keeps an instance registered. Thread-safe; no call but `close` waits.

    Args:
        router_url: `http://host:port` of the router.
        secret: the cluster's, or None on loopback.
        report: called on this client's thread at every heartbeat; must be quick and must not raise.
    """

    def __init__(self, router_url: str, secret: bytes | None, report: Callable[[], InstanceReport]) -> None:
        parts = urllib.parse.urlsplit(router_url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"the router's URL is {router_url!r}; expected http://host:port")
        self._host, self._port = parts.hostname, parts.port or 80
        self._prefix = parts.path.rstrip("/")
        self._url = router_url
        self._secret = secret
        self._report = report
        self._condition = threading.Condition()
        self._outcomes: deque[Outcome] = deque()
        self._closing = False
        self._registered = threading.Event()
        self._connection: http.client.HTTPConnection | None = None
        self._thread = threading.Thread(target=self._run, name="kvferry-membership", daemon=True)
        self._reachable: bool | None = None
        self._warned: frozenset[str] = frozenset()
        self.superseded = False

    def start(self) -> None:
        """Start to register; returns at once. An absent router is tried again until it is there."""
        self._thread.start()

    def wait_registered(self, timeout_s: float) -> bool:
        """Wait until the router has this instance in its table; False if it has not within `timeout_s`."""
        return self._registered.wait(timeout_s)

    def report_outcome(self, outcome: Outcome) -> None:
        """Tell the router how a handoff ended, at once, with a few retries; the oldest are dropped beyond a bound."""
        with self._condition:
            if len(self._outcomes) >= MAX_OUTCOMES:
                self._outcomes.popleft()
                _log.warning("more than %d outcomes wait for the router at %s; dropped one", MAX_OUTCOMES, self._url)
            self._outcomes.append(outcome)
            self._condition.notify()

    def close(self) -> None:
        """Send what is left (one try), leave the router's table, end the thread. Idempotent; takes seconds at most."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(4 * CALL_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._serve()
            self._leave()
        finally:
            self._disconnect()

    def _serve(self) -> None:
        lease = Lease(ttl_s=3.0, heartbeat_s=1.0)
        beat_at_s = time.monotonic()
        tries = 0
        while True:
            with self._condition:
                while not self._closing and not self._outcomes and time.monotonic() < beat_at_s:
                    self._condition.wait(beat_at_s - time.monotonic())
                if self._closing and not self._outcomes:
                    return
                batch = list(self._outcomes)[:MAX_OUTCOMES_A_CALL]
            if batch:
                sent = self._post_outcomes(batch)
                tries = 0 if sent else tries + 1
                if sent or tries >= OUTCOME_TRIES or self._closing:
                    self._forget(batch, sent)
                    tries = 0
            if time.monotonic() >= beat_at_s and not self.superseded:
                answer = self._heartbeat()
                lease = answer or lease
                beat_at_s = time.monotonic() + (lease.heartbeat_s if answer else RETRY_S)
            elif self.superseded:
                beat_at_s = time.monotonic() + lease.heartbeat_s
            if tries:
                with self._condition:
                    self._condition.wait(RETRY_S)

    def _forget(self, batch: list[Outcome], sent: bool) -> None:
        if not sent:
            _log.error("gave up reporting %d outcomes to the router at %s", len(batch), self._url)
        with self._condition:
            gone = {id(o) for o in batch}
            self._outcomes = deque(o for o in self._outcomes if id(o) not in gone)

    def _post_outcomes(self, batch: list[Outcome]) -> bool:
        status, body = self._call("POST", OUTCOMES_PATH, msgspec.json.encode(batch))
        if 400 <= status < 500:
            _log.error("the router at %s refuses outcomes: %s %s", self._url, status, body[:500])
            return True
        return status == 200

    def _heartbeat(self) -> Lease | None:
        status, body = self._call("POST", INSTANCES_PATH, msgspec.json.encode(self._report()))
        if status == 409:
            self.superseded = True
            self._registered.clear()
            _log.error("the router at %s knows a newer instance of this name; this one stops reporting: %s",
                       self._url, body[:500])  # fmt: skip
            return None
        if status != 200:
            if self._reachable is not False:
                _log.warning("not registered at the router %s: %s %s", self._url, status or "no answer", body[:500])
            self._reachable = False
            self._registered.clear()
            return None
        try:
            lease = msgspec.json.decode(body, type=Lease)
        except msgspec.MsgspecError as error:
            _log.warning("the router at %s gave an answer that is no lease: %s", self._url, error)
            return None
        if not self._reachable:
            _log.info("registered at the router %s", self._url)
        self._reachable = True
        self._registered.set()
        for warning in set(lease.warnings) - self._warned:
            _log.warning("the router at %s warns: %s", self._url, warning)
        self._warned = frozenset(lease.warnings)
        return lease

    def _leave(self) -> None:
        if not self._registered.is_set():
            return
        report = self._report()
        query = urllib.parse.urlencode({"incarnation": report.incarnation})
        self._call("DELETE", f"{INSTANCES_PATH}/{urllib.parse.quote(report.instance_id, safe='')}?{query}", b"")

    def _call(self, method: str, path: str, body: bytes) -> tuple[int, str]:
        """Status and body of the router's answer; status 0 and the reason where there was none."""
        path = self._prefix + path
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        if self._secret is not None:
            headers["x-kvferry-auth"] = sign_http(self._secret, method, path, body)
        # A connection that the router closed while it was idle shows that only when it is used: a second try is due.
        for fresh in (self._connection is None, True):
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection(self._host, self._port, timeout=CALL_TIMEOUT_S)
                self._connection.request(method, path, body=body, headers=headers)
                response = self._connection.getresponse()
                return response.status, response.read().decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                self._disconnect()
                if fresh:
                    return 0, f"({str(error) or type(error).__name__})"
        raise AssertionError("the second try is always a fresh one")

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
