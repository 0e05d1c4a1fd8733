"""Real engines and a real pool node, killed and stopped: right tokens, bounded waits, nothing lost, the cache stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from live import ENVIRONMENT, LONG, WAIT_S, Live, complete

from kvferry.cluster.instances import start_engine
from kvferry.cluster.local import ClusterPlan, LocalCluster
from kvferry.config import load
from kvferry.observe import LISTENING
from pool_processes import fixed_port

SECRET = "a secret of this test's cluster"
POOL_DEADLINE_S = 8.0
pytestmark = [pytest.mark.leaks_allowed, pytest.mark.timeout(300)]  # The cluster of the module lives on.


class Node:
    """`kvferry node` as a process, always at the same address."""

    def __init__(self) -> None:
        self.address = f"tcp://127.0.0.1:{fixed_port()}"
        self.start()

    def start(self) -> None:
        flags = ["--arena-bytes", "64MiB", "--slab-bytes", "96KiB", "--listen", self.address, "--log-level", "error"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvferry", "node", *flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "KVFERRY_CLUSTER_SECRET": SECRET},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(LISTENING)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class WithPool(Live):
    """A pair behind a router and two engines alone, all of one pool; the reference has none."""

    def __init__(self, node: Node) -> None:
        self.node = node
        environment = {
            **ENVIRONMENT,
            "KVFERRY_CLUSTER_SECRET": SECRET,
            "KVFERRY_ENGINE_POOL": node.address,
            "KVFERRY_ENGINE_POOL_DEADLINE_S": f"{POOL_DEADLINE_S}s",
        }
        settings = load("", environment, {})
        self._loop = asyncio.new_event_loop()
        self.cluster = LocalCluster(ClusterPlan(1, 1, settings), lambda line: None, num_alone=3)
        self._pool = ThreadPoolExecutor(64)
        self._references: dict[tuple[str, int], list[int]] = {}
        try:
            self._run(self._start())
        except BaseException:
            self.close()
            raise
        self.url = self.cluster.router_url

    async def _start(self) -> None:
        # Loading a model keeps one core busy: all of them at once. The reference has no pool.
        settings = self.cluster.settings
        without = msgspec.structs.replace(settings, engine=msgspec.structs.replace(settings.engine, pool=()))
        start = start_engine(without, os.environ, name="single", role="both", router_url=None, gpus=None)
        single = self.cluster._launch(start)
        await asyncio.gather(self.cluster.start(), *map(self.cluster.start_alone, "ab"))
        self.reference_url = await self.cluster._url_of(single, time.monotonic() + WAIT_S)

    def start_alone(self, name: str) -> None:
        self._run(self.cluster.start_alone(name))

    def at(self, name: str, prompt: str) -> Any:
        """A future of what one instance answers."""
        return self._pool.submit(complete, self.child(name).told_url(), prompt, 8, 90.0)

    def pooled(self, name: str) -> int:
        """Prompt tokens that an instance got from the pool."""
        return int(self.kv(name)["pooled_prompt_tokens"])

    def failures(self, name: str, *causes: str) -> int:
        return sum(self.kv(name)["pool"]["failures"].get(cause, 0) for cause in causes)

    def saved(self, name: str) -> None:
        """Return when an instance has nothing more to save."""
        self.wait(lambda: self.kv(name)["pool_transfers"] == 0, WAIT_S, f"{name} to have saved")

    def full_tokens(self, prompt: str) -> int:
        """Tokens of a prompt in blocks that others can find."""
        body = complete(self.reference_url, prompt, 1, 90.0).body
        return (body["usage"]["prompt_tokens"] - 1) // 16 * 16


@pytest.fixture(scope="module")
def live() -> Iterator[WithPool]:
    node = Node()
    try:
        live = WithPool(node)
        yield live
        live.close()
    finally:
        node.kill()


@pytest.fixture(autouse=True)
def idle_afterwards(live: WithPool) -> Iterator[None]:
    yield
    if live.node.process.poll() is not None:
        live.node.start()
    live.node.go_on()
    live.require_idle()


def numbered(number: int, text: str = LONG) -> str:
    """A prompt of its own from its first token on."""
    return f"{number} {number * 7919} {text}"


def serves_again(live: WithPool, first: int) -> bool:
    """Whether b comes to get from the pool again what a saved there. Prompts are numbered from `first` on."""
    numbers = iter(range(first, first + 1000))

    def served() -> bool:
        prompt = numbered(next(numbers), LONG[:200])
        assert live.at("a", prompt).result(90).status == 200
        live.saved("a")
        before = live.pooled("b")
        assert live.at("b", prompt).result(90).tokens == live.reference(prompt)
        return live.pooled("b") > before

    live.wait(served, 2 * WAIT_S, "the pool to serve again")
    return True


def test_the_second_engine_gets_what_the_first_one_computed(live: WithPool) -> None:
    for number, text in enumerate(("x", "What is a ferry?", LONG[:301], LONG, LONG * 2)):
        prompt = numbered(number, text)
        want, num_full = live.reference(prompt), live.full_tokens(prompt)
        assert live.at("a", prompt).result(90).tokens == want
        live.saved("a")
        before = live.kv("b")
        answer = live.at("b", prompt).result(90)
        after = live.kv("b")
        assert answer.tokens == want
        assert after["pooled_prompt_tokens"] - before["pooled_prompt_tokens"] == num_full
        computed = after["computed_prompt_tokens"] - before["computed_prompt_tokens"]
        assert computed == answer.body["usage"]["prompt_tokens"] - num_full
    stats = live.kv("b")["pool"]
    assert stats["loaded_blocks"]["host"] * 16 == live.pooled("b")
    assert not stats["failures"]
    with urllib.request.urlopen(live.child("b").told_url() + "/metrics", timeout=WAIT_S) as answer:
        metrics = answer.read().decode()
    blocks = stats["loaded_blocks"]["host"]
    assert f'kvferry_engine_pool_loaded_blocks_total{{tier="host"}} {float(blocks)}' in metrics
    assert f'kvferry_engine_tokens_total{{phase="pooled"}} {float(16 * blocks)}' in metrics


def test_an_engine_that_was_killed_finds_its_cache_again(live: WithPool) -> None:
    prompt = numbered(10)
    want = live.reference(prompt)
    assert live.at("a", prompt).result(90).tokens == want
    live.saved("a")
    live.kill("a")
    live.start_alone("a")
    assert live.at("a", prompt).result(90).tokens == want
    assert live.pooled("a") == live.full_tokens(prompt) > 0


def test_a_pair_with_a_pool_hands_over_and_saves(live: WithPool) -> None:
    known, new = numbered(20), numbered(21)
    assert live.at("a", known).result(90).tokens == live.reference(known)
    live.saved("a")
    for prompt, num_pooled in ((known, live.full_tokens(known)), (new, 0)):
        before = live.pooled("prefill-0")
        answer = live.ask(prompt)
        assert (answer.status, answer.state) == (200, "delivered"), answer
        assert answer.tokens == live.reference(prompt)
        assert live.pooled("prefill-0") - before == num_pooled
    live.saved("prefill-0")
    before = live.pooled("b")
    assert live.at("b", new).result(90).tokens == live.reference(new)
    assert live.pooled("b") - before == live.full_tokens(new)


def test_decode_takes_from_the_pool_what_a_killed_prefill_did_not_hand_over(live: WithPool) -> None:
    prompt = numbered(30)
    want = live.reference(prompt)
    assert live.at("a", prompt).result(90).tokens == want
    live.saved("a")
    before = live.pooled("decode-0")
    live.signal("prefill-0", signal.SIGSTOP)
    asked = live.ask_soon(prompt)
    live.wait(lambda: live.kv("decode-0")["parked"] == 1 or asked.done(), WAIT_S, "decode to wait for the handoff")
    live.kill("prefill-0")
    answer = asked.result(90)
    assert answer.status == 200 and answer.tokens == want, answer
    assert answer.state == "recomputed", answer
    assert live.pooled("decode-0") - before == live.full_tokens(prompt)
    live.restart("prefill-0")


def test_a_node_killed_while_prompts_wait_for_it(live: WithPool) -> None:
    prompt, other = numbered(40), numbered(41)
    want = live.reference(prompt), live.reference(other)
    assert live.at("a", prompt).result(90).tokens == want[0]
    live.saved("a")
    # On a machine that is slow enough, the deadline passes before the node is killed.
    causes = "peer_gone", "transfer_timeout"
    before, lost = live.pooled("b"), live.failures("b", *causes)
    live.node.stop()
    asked = [live.at("b", prompt), live.at("b", other)]
    live.wait(lambda: live.kv("b")["parked"] == 2 or asked[0].done(), WAIT_S, "both to wait for the pool")
    live.node.kill()
    assert tuple(future.result(90).tokens for future in asked) == want
    assert live.pooled("b") == before
    assert live.failures("b", *causes) > lost
    # With no node at all, nothing waits and nothing fails.
    assert live.at("b", numbered(42)).result(90).tokens == live.reference(numbered(42))
    live.require_idle()
    live.node.start()
    assert serves_again(live, 1000)


def test_a_stopped_node_is_waited_for_and_then_computed_without(live: WithPool) -> None:
    prompt = numbered(60)
    want = live.reference(prompt)
    assert live.at("a", prompt).result(90).tokens == want
    live.saved("a")
    before, late = live.pooled("b"), live.failures("b", "transfer_timeout")
    live.node.stop()
    assert live.at("b", prompt).result(90).tokens == want
    assert live.failures("b", "transfer_timeout") > late
    assert live.at("b", numbered(61)).result(90).tokens == live.reference(numbered(61))
    assert live.pooled("b") == before
    live.require_idle()
    live.node.go_on()
    assert serves_again(live, 3000)
