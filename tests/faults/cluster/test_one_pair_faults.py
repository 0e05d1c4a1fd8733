"""One prefill and one decode instance, as real processes, hurt in every way: bounded, right or honest, nothing lost."""

from __future__ import annotations

import contextlib
import http.client
import json
import mmap
import random
import signal
import statistics
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openai
import pytest
from client_calls import CHECKS
from live import DEADLINE_S, LEASE_S, LONG, ONE_PAIR_BLOCKS, SLACK_S, WAIT_S, Answer, Live

BOUND_S = DEADLINE_S + LEASE_S + SLACK_S
pytestmark = [pytest.mark.leaks_allowed, pytest.mark.timeout(300)]  # The cluster of the module lives on.


@pytest.fixture(autouse=True)
def idle_afterwards(one_pair: Live) -> None:
    yield
    one_pair.require_idle()


def fresh(text: str = LONG) -> str:
    """A prompt that no prefix cache knows."""
    return f"{random.Random(time.monotonic_ns()).getrandbits(64):x} {text}"


def test_healthy_first(one_pair: Live) -> None:
    for text in ("x", "What is a ferry?", LONG):
        prompt = fresh(text)
        answer = one_pair.ask(prompt)
        assert (answer.status, answer.state) == (200, "delivered"), answer
        assert answer.tokens == one_pair.reference(prompt)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_official_client_drives_it(one_pair: Live, check: Callable[[openai.OpenAI], None]) -> None:
    with openai.OpenAI(base_url=one_pair.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        check(client)


def test_prefill_killed_before_the_request(one_pair: Live) -> None:
    prompt = fresh()
    want = one_pair.reference(prompt)
    one_pair.kill("prefill-0")
    answer = one_pair.ask(prompt)
    assert answer.seconds < BOUND_S
    if answer.status == 200:
        assert answer.tokens == want
        assert answer.state in ("recomputed", "delivered"), answer
    else:
        assert answer.status == 503 and answer.outcome.startswith("failed"), answer
    one_pair.restart("prefill-0")
    assert one_pair.ask(prompt).tokens == want


@pytest.mark.parametrize("stage", ["waiting", "pulling"])
def test_prefill_killed_while_decode_waits_for_it(one_pair: Live, stage: str) -> None:
    prompt = fresh()
    want = one_pair.reference(prompt)
    future = one_pair.ask_soon(prompt)
    one_pair.wait(lambda: stage in one_pair.stages("decode-0") or future.done(), WAIT_S, f"stage {stage}")
    one_pair.kill("prefill-0")
    answer = future.result(90)
    assert answer.status == 200 and answer.tokens == want, answer
    assert answer.state in ("recomputed", "delivered"), answer
    if answer.state == "recomputed":
        assert "cause=peer_gone" in answer.outcome
    one_pair.restart("prefill-0")


def test_prefill_killed_after_the_transfer(one_pair: Live) -> None:
    prompt = fresh("What is a ferry? ")
    want = one_pair.reference(prompt, 200)
    future = one_pair.ask_soon(prompt, 200)
    one_pair.wait(
        lambda: one_pair.kv("decode-0")["running"] > 0 and not one_pair.stages("decode-0"), WAIT_S, "decoding"
    )
    one_pair.kill("prefill-0")
    answer = future.result(90)
    assert (answer.status, answer.tokens, answer.state) == (200, want, "delivered"), answer
    one_pair.restart("prefill-0")


def test_decode_killed(one_pair: Live) -> None:
    future = one_pair.ask_soon(fresh(), 100)
    one_pair.wait(lambda: bool(one_pair.stages("decode-0")) or future.done(), WAIT_S, "the handoff")
    one_pair.kill("decode-0")
    answer = future.result(90)
    assert answer.seconds < BOUND_S
    assert answer.status >= 500 and answer.body["error"]["message"], answer
    one_pair.restart("decode-0")
    prompt = fresh()
    assert one_pair.ask(prompt).tokens == one_pair.reference(prompt)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_stopped_for_longer_than_the_lease_and_then_woken(one_pair: Live, victim: str) -> None:
    """What was held for the stopped side is used again meanwhile, for others; nobody may take the wrong bytes."""
    prompt = fresh()
    want = one_pair.reference(prompt)
    num_before = one_pair.kv("prefill-0")["computed_prompt_tokens"]
    future = one_pair.ask_soon(prompt)
    one_pair.wait(lambda: bool(one_pair.stages("decode-0")) or future.done(), WAIT_S, "the handoff")
    one_pair.signal(victim, signal.SIGSTOP)
    others = [fresh() for _ in range(4)]
    try:
        futures = [one_pair.ask_soon(other) for other in others]
        time.sleep(LEASE_S * 1.2)
        if victim == "decode-0":
            # More than fits into the prefill instance at once: the blocks of the first have other bytes by now.
            one_pair.wait(
                lambda: one_pair.kv("prefill-0")["computed_prompt_tokens"] - num_before > ONE_PAIR_BLOCKS * 16,
                DEADLINE_S + SLACK_S,
                lambda: f"blocks to be used again: {one_pair.kv('prefill-0')}",
            )
    finally:
        one_pair.signal(victim, signal.SIGCONT)
    for text, waiting in [(prompt, future), *zip(others, futures, strict=True)]:
        answer = waiting.result(90)
        assert answer.seconds < BOUND_S + LEASE_S
        assert answer.outcome, answer
        if answer.status == 200:
            assert answer.tokens == (want if text is prompt else one_pair.reference(text)), answer
        else:
            assert answer.body["error"]["message"], answer
    one_pair.wait(lambda: one_pair.ask(fresh("again")).state == "delivered", WAIT_S, "handoffs to work again")


def test_a_byte_that_changes_in_the_prefill_instance_is_caught(one_pair: Live) -> None:
    """Memory goes bad between publishing and reading: the digest says so, and decode computes the prompt itself."""
    for _ in range(5):
        answer = answer_over_bad_memory(one_pair)
        if answer.cause == "integrity_error":
            break  # If not: on a busy machine the lease may end before decode, just woken, has read.
    assert (answer.state, answer.cause) == ("recomputed", "integrity_error"), answer


def answer_over_bad_memory(one_pair: Live) -> Answer:
    """The answer to a request whose blocks change after they were published; its tokens are right in any case."""
    prompt = fresh("What is a ferry?")
    want = one_pair.reference(prompt)
    prefill = one_pair.child("prefill-0").pid
    one_pair.signal("decode-0", signal.SIGSTOP)
    is_bad = False
    try:
        future = one_pair.ask_soon(prompt)
        with contextlib.suppress(AssertionError):
            one_pair.wait(lambda: "sealed" in one_pair.stages("prefill-0"), LEASE_S, "the seal")
            flip_every_block(prefill)
            is_bad = True
    finally:
        one_pair.signal("decode-0", signal.SIGCONT)
    answer = future.result(90)
    assert (answer.status, answer.tokens) == (200, want), answer
    if is_bad:
        flip_every_block(prefill)  # Else its prefix cache would stay poisoned, as after a real memory error.
    return answer


def flip_every_block(pid: int) -> None:
    """Change one bit in each 512 bytes of the process's largest shared memory."""
    sizes: dict[Path, int] = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # The process opens and closes others meanwhile.
            if "memfd:kvferry" in str(fd.readlink()):
                sizes[fd] = fd.stat().st_size
    with max(sizes, key=sizes.__getitem__).open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        view = np.frombuffer(memory, dtype=np.uint8)
        view[::512] ^= 1
        del view


def test_a_client_that_leaves_at_ten_moments_leaves_nothing_behind(one_pair: Live) -> None:
    """Blocks are free at once, long before a lease or a deadline would free them."""
    where = urllib.parse.urlsplit(one_pair.url)
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    took_s = []
    for _ in range(10):
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=WAIT_S)
        body = {"model": "kvferry-demo", "prompt": fresh(), "max_tokens": 900, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        time.sleep(rng.uniform(0.0, 1.2))
        connection.close()
        took_s += [one_pair.wait(lambda: num_held(one_pair) == 0, WAIT_S, lambda: f"{num_held(one_pair)} blocks to go")]
    assert statistics.median(took_s) < LEASE_S / 2, took_s


def num_held(one_pair: Live) -> int:
    """Blocks that are not free, on both instances."""
    states = [one_pair.kv(name) for name in ("prefill-0", "decode-0")]
    return sum(state["num_blocks"] - state["free_blocks"] for state in states)


def test_router_killed(one_pair: Live) -> None:
    """Both engines notice that the connections closed, and free everything; they live on."""
    future = one_pair.ask_soon(fresh(), 200)
    one_pair.wait(lambda: one_pair.kv("decode-0")["running"] + one_pair.kv("prefill-0")["running"] > 0, WAIT_S, "work")
    one_pair.kill("router")
    with pytest.raises((ConnectionError, http.client.HTTPException, OSError)):
        future.result(90)
    one_pair.require_idle()
