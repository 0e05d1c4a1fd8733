"""Two hundred requests on two prefill and two decode instances while processes are killed and come back."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest
from live import DEADLINE_S, LEASE_S, Live

pytestmark = [pytest.mark.leaks_allowed, pytest.mark.timeout(600)]
NUM_REQUESTS, NUM_PROMPTS, MAX_TOKENS = 200, 25, 8


def test_two_hundred_requests_and_random_kills_none_lost_none_wrong(two_pairs: Live) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    prompts = [f"{seed:x} {i} " + "over the water " * rng.randint(1, 40) for i in range(NUM_PROMPTS)]
    references = {p: two_pairs.reference(p, MAX_TOKENS) for p in prompts}
    sent = [rng.choice(prompts) for _ in range(NUM_REQUESTS)]
    slots = threading.Semaphore(60)
    futures = []
    kills = {30: "prefill-0", 80: "decode-1", 120: "prefill-1"}
    for i, prompt in enumerate(sent):
        slots.acquire()
        future = two_pairs.ask_soon(prompt, MAX_TOKENS)
        future.add_done_callback(lambda _: slots.release())
        futures.append(future)
        if i in kills:
            time.sleep(rng.uniform(0.05, 0.5))
            two_pairs.kill(kills[i])
            two_pairs.restart(kills[i])
    seen: Counter[str] = Counter()
    for prompt, future in zip(sent, futures, strict=True):
        answer = future.result(120)
        if answer.status == 200:
            assert answer.tokens == references[prompt], answer
            assert answer.state in ("delivered", "recomputed"), answer
        else:
            assert answer.status in (502, 503, 504) and answer.body["error"]["message"], answer
            assert answer.outcome.startswith("failed"), answer
        assert answer.seconds < 60.0 + DEADLINE_S + LEASE_S
        seen[answer.state] += 1
    print(dict(seen))
    assert sum(seen.values()) == NUM_REQUESTS
    assert seen["delivered"] > NUM_REQUESTS / 2, seen
    two_pairs.require_idle()


def test_three_prefills_on_one_decode() -> None:
    """An unequal cluster: every prefill instance is used, all tokens are right."""
    live = Live(3, 1)
    try:
        prompts = [f"{i} The captain of the ferry counts his passengers. " * 4 for i in range(18)]
        futures = [live.ask_soon(p) for p in prompts]
        for prompt, future in zip(prompts, futures, strict=True):
            answer = future.result(90)
            assert (answer.status, answer.tokens, answer.state) == (200, live.reference(prompt), "delivered"), answer
        assert {r.prefill for r in live.recent()} == {"prefill-0", "prefill-1", "prefill-2"}
        live.require_idle()
    finally:
        live.close()
