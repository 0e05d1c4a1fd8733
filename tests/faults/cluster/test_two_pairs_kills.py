"""Two hundred requests at once on two prefill and two decode instances, of which three are killed and come back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
from live import LEASE_S, SLACK_S, Live

pytestmark = [pytest.mark.leaks_allowed, pytest.mark.timeout(600)]
NUM_REQUESTS, NUM_PROMPTS, MAX_TOKENS = 200, 25, 8
REQUEST_DEADLINE_S, HANDOFF_DEADLINE_S = 90.0, 45.0


@pytest.fixture
def two_pairs() -> Iterator[Live]:
    # The last of two hundred waits long for its turn; that is no fault of a handoff.
    deadlines = {
        "KVFERRY_ROUTER_REQUEST_DEADLINE_S": f"{REQUEST_DEADLINE_S}s",
        "KVFERRY_HANDOFF_DEADLINE_S": f"{HANDOFF_DEADLINE_S}s",
    }
    live = Live(2, 2, **deadlines)
    yield live
    live.close()


def test_two_hundred_requests_at_once_and_random_kills_none_lost_none_wrong(two_pairs: Live) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    prompts = [f"{seed:x} {i} " + "over the water " * rng.randint(1, 40) for i in range(NUM_PROMPTS)]
    references = {p: two_pairs.reference(p, MAX_TOKENS) for p in prompts}
    sent = [rng.choice(prompts) for _ in range(NUM_REQUESTS)]
    futures = [two_pairs.ask_soon(prompt, MAX_TOKENS) for prompt in sent]

    def num_answered() -> int:
        return sum(future.done() for future in futures)

    prefill, decode = rng.randrange(2), rng.randrange(2)
    victims = [f"prefill-{prefill}", f"decode-{decode}", f"prefill-{1 - prefill}"]
    rng.shuffle(victims)
    for victim, earliest in zip(victims, (5, 40, 80), strict=True):
        moment = rng.randint(earliest, earliest + 30)
        two_pairs.wait(lambda moment=moment: num_answered() >= moment, REQUEST_DEADLINE_S, f"{moment} answers")
        print(f"{victim} is killed after {num_answered()} answers")
        two_pairs.kill(victim)
        two_pairs.launch_again(victim)

    seen: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    for prompt, future in zip(sent, futures, strict=True):
        answer = future.result(2 * REQUEST_DEADLINE_S)
        if answer.status == 200:
            assert answer.tokens == references[prompt], answer
            assert answer.state in ("delivered", "recomputed"), answer
        else:
            assert answer.status in (502, 503, 504) and answer.body["error"]["message"], answer
            assert answer.outcome.startswith("failed"), answer
        assert answer.seconds < REQUEST_DEADLINE_S + LEASE_S + SLACK_S
        seen[answer.state] += 1
        causes[answer.cause] += 1
    print(dict(seen), dict(causes))
    assert sum(seen.values()) == NUM_REQUESTS
    assert seen["delivered"] > 20 and seen["delivered"] + seen["recomputed"] > NUM_REQUESTS / 2, seen
    for victim in victims:
        two_pairs.wait_joined(victim)
    two_pairs.require_idle()
    last = two_pairs.ask(f"{seed:x} and all is well again")
    assert last.state == "delivered", last


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
