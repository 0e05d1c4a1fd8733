"""A real cluster (router, prefill, decode processes) that a test can hurt, and what its instances say of themselves."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec

from kvferry.cluster.instances import start_engine
from kvferry.cluster.local import ClusterPlan, LocalCluster
from kvferry.cluster.router_view import EndedRequest, InstanceRow, RouterView
from kvferry.config import Settings, load
from kvferry.errors import PeerGone
from kvferry.types import Role

LEASE_S, DEADLINE_S = 6.0, 20.0
SLACK_S = 20.0
"""Beyond what the product promises, on a machine that may give a process no CPU for seconds."""

WAIT_S = 60.0
ONE_PAIR_BLOCKS = 192
ENVIRONMENT = {
    "KVFERRY_HANDOFF_LEASE_TTL_S": f"{LEASE_S}s",
    "KVFERRY_HANDOFF_HEARTBEAT_S": "600ms",
    "KVFERRY_HANDOFF_DEADLINE_S": f"{DEADLINE_S}s",
    "KVFERRY_ROUTER_PORT": "0",
    "KVFERRY_ROUTER_TTL_S": "10s",
    "KVFERRY_ROUTER_REQUEST_DEADLINE_S": "60s",
    "KVFERRY_ENGINE_NUM_BLOCKS": "1024",
}
LONG = "The ferry carries what was computed on one bank to those who wait on the other. " * 12


class Answer(NamedTuple):
    """One completion as a client saw it."""

    status: int
    tokens: list[int] | None
    outcome: str
    seconds: float
    body: dict[str, Any]

    @property
    def state(self) -> str:
        return self.outcome.split(";")[0]

    @property
    def cause(self) -> str:
        return self.outcome.partition("cause=")[2].partition(";")[0]


class Live:
    """A running cluster. Every wait in here has an end."""

    def __init__(self, num_prefill: int, num_decode: int, **environment: str) -> None:
        self._loop = asyncio.new_event_loop()
        settings: Settings = load("", {**ENVIRONMENT, **environment}, {})
        self.cluster = LocalCluster(ClusterPlan(num_prefill, num_decode, settings), lambda line: None, num_alone=1)
        self._pool = ThreadPoolExecutor(256)
        try:
            self._run(self._start())
        except BaseException:
            self.close()
            raise
        self.url = self.cluster.router_url
        self._references: dict[tuple[str, int], list[int]] = {}

    async def _start(self) -> None:
        _, self.reference_url = await asyncio.gather(self.cluster.start(), self.cluster.start_alone("single"))

    def close(self) -> None:
        self._run(self.cluster.stop())
        self._pool.shutdown()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    # Requests ----------------------------------------------------------------------------------------------------

    def ask(self, prompt: str, max_tokens: int = 8, timeout_s: float = 90.0) -> Answer:
        return complete(self.url, prompt, max_tokens, timeout_s)

    def ask_soon(self, prompt: str, max_tokens: int = 8) -> Any:
        """A future of the answer."""
        return self._pool.submit(self.ask, prompt, max_tokens)

    def reference(self, prompt: str, max_tokens: int = 8) -> list[int]:
        """What one instance alone answers."""
        key = (prompt, max_tokens)
        if key not in self._references:
            answer = complete(self.reference_url, prompt, max_tokens, 90.0)
            assert answer.status == 200 and answer.tokens
            self._references[key] = answer.tokens
        return self._references[key]

    # Processes ---------------------------------------------------------------------------------------------------

    def child(self, name: str) -> Any:
        return next(c for c in reversed(self.cluster.children) if c.name == name)

    def signal(self, name: str, what: signal.Signals) -> None:
        os.kill(self.child(name).pid, what)

    def kill(self, name: str) -> None:
        """kill -9, and take the dead child out of the cluster's watch."""
        child = self.child(name)
        os.kill(child.pid, signal.SIGKILL)
        child.kill()
        self.cluster.children.remove(child)

    def leave(self, name: str) -> None:
        """End an instance as a supervisor does; returns when the router does not count it any more."""
        child = self.child(name)
        self.cluster.children.remove(child)
        self._run(child.stop(WAIT_S))
        self.wait(lambda: all(r.instance_id != name for r in self.instances()), WAIT_S, f"{name} to leave")

    def restart(self, name: str) -> None:
        """Start an instance again under its name; returns when the router knows the new one."""
        self.launch_again(name)
        self.wait_joined(name)

    def launch_again(self, name: str) -> None:
        """Start an instance again under its name; it joins when it has loaded its model."""
        role: Role = "prefill" if name.startswith("prefill") else "decode"
        self.cluster._launch(self.cluster._instance_start(name, role, None, None))

    def wait_joined(self, name: str) -> None:
        """Until the router knows the latest process of this name."""
        child = self.child(name)
        self.wait(lambda: child.told_url() is not None, 2 * WAIT_S, f"{name} to listen")
        self.wait(lambda: any(r.url == child.url for r in self.instances()), WAIT_S, f"{name} to join")

    def add(self, name: str, role: Role, *program: str, **environment: str) -> None:
        """Start one more instance with settings of its own; `program` runs in place of `python -m kvferry engine`.

        The router learns of it when it is up: wait for that.
        """
        settings = load("", {**ENVIRONMENT, "KVFERRY_ENGINE_NUM_THREADS": "1", **environment}, {})
        settings = msgspec.structs.replace(settings, cluster=self.cluster.settings.cluster)
        start = start_engine(settings, os.environ, name=name, role=role, router_url=self.url, gpus=None)
        self.cluster._launch(dataclasses.replace(start, argv=program or start.argv))

    # What is seen ------------------------------------------------------------------------------------------------

    def instances(self) -> list[InstanceRow]:
        return self._view(lambda view: view.instances())

    def recent(self) -> list[EndedRequest]:
        return self._view(lambda view: view.requests()).recent

    def _view(self, read: Callable[[RouterView], Coroutine[Any, Any, Any]]) -> Any:
        async def look() -> Any:
            async with RouterView(self.url) as view:
                return await read(view)

        give_up_s = time.monotonic() + WAIT_S
        while True:
            try:
                return self._run(look())
            except PeerGone:
                # While several processes start on two cores, a look may come to nothing; a dead router stays dead.
                if time.monotonic() > give_up_s:
                    raise

    def kv(self, name: str) -> dict[str, Any]:
        """An instance's own account of its blocks."""
        return get(self.child(name).told_url() + "/debug/kv")

    def stages(self, name: str) -> set[str]:
        return {view["stage"] for view in self.kv(name)["handoffs"]}

    def require_idle(self, timeout_s: float = DEADLINE_S + LEASE_S + SLACK_S) -> None:
        """Every instance reports all of its blocks free."""
        names = [c.name for c in self.cluster.children if c.name != "router"]

        def idle() -> bool:
            states = [self.kv(name) for name in names]
            return all(s["free_blocks"] == s["num_blocks"] and not s["running"] + s["waiting"] for s in states)

        self.wait(idle, timeout_s, lambda: f"all blocks to be free: { {n: self.kv(n) for n in names} }")

    def wait(self, done: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]) -> float:
        """Poll; gives the seconds that it took. Raises: AssertionError naming what did not come."""
        began_s = time.monotonic()
        while not done():
            if time.monotonic() - began_s > timeout_s:
                raise AssertionError(f"waited {timeout_s} s for {what if isinstance(what, str) else what()}")
            time.sleep(0.01)
        return time.monotonic() - began_s


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return json.loads(answer.read())


def complete(url: str, prompt: str, max_tokens: int, timeout_s: float) -> Answer:
    body = {
        "model": "kvferry-demo",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    began_s = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            status, headers, data = response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, headers, data = error.code, error.headers, error.read()
    parsed = json.loads(data)
    tokens = parsed["choices"][0].get("token_ids") if status == 200 else None
    return Answer(status, tokens, headers.get("x-kvferry-outcome", ""), time.monotonic() - began_s, parsed)
