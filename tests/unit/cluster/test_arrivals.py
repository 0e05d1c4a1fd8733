"""The plan of a load: what is sent when, the same each time."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from kvferry.cluster.arrivals import Load, plan_arrivals, tokens_of
from kvferry.errors import ConfigError
from kvferry.request_trace import TracedRequest, read_request_trace

TRACE = [
    TracedRequest(700, (1, 2), 5000.0, 40),
    TracedRequest(1100, (1, 2, 3), 5000.0, 3),
    TracedRequest(90, (9,), 7500.0, 400),
]


def test_without_a_trace_no_prompt_shares_a_prefix_and_nothing_has_a_time() -> None:
    plan = plan_arrivals(Load(3, prompt_tokens=20, max_tokens=7))
    prompts = [tokens_of(arrival, 0) for arrival in plan]
    assert [len(prompt) for prompt in prompts] == [20, 20, 20]
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 3
    assert {(arrival.at_s, arrival.max_tokens) for arrival in plan} == {(None, 7)}
    assert prompts[0] == tokens_of(plan[0], 0) != tokens_of(plan[0], 1)


def test_a_rate_sends_at_random_times_of_that_mean() -> None:
    plan = plan_arrivals(Load(4000, rate=50.0, seed=3))
    times = [arrival.at_s for arrival in plan if arrival.at_s is not None]
    assert times[0] == 0.0 and times == sorted(times) and len(times) == 4000
    assert times[-1] == pytest.approx(80.0, rel=0.1)
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    # Poisson, not a metronome: half of the gaps are below ln 2 of their mean.
    assert gaps[len(gaps) // 2] == pytest.approx(0.693 / 50, rel=0.1)
    assert plan == plan_arrivals(Load(4000, rate=50.0, seed=3)) != plan_arrivals(Load(4000, rate=50.0, seed=4))


def test_a_trace_gives_times_lengths_and_shared_prefixes() -> None:
    plan = plan_arrivals(Load(3, trace="t"), TRACE)
    assert [arrival.at_s for arrival in plan] == [0.0, 0.0, 2.5]
    assert [arrival.max_tokens for arrival in plan] == [40, 3, 400]
    one, two, three = (tokens_of(arrival, 0) for arrival in plan)
    assert [len(one), len(two), len(three)] == [700, 1100, 90]
    assert two[:700] == one and three[:90] != one[:90]


def test_a_scaled_trace_keeps_what_is_shared() -> None:
    plan = plan_arrivals(Load(3, trace="t", scale=1 / 16, rate=2.0), TRACE)
    one, two, three = (tokens_of(arrival, 0) for arrival in plan)
    assert [len(one), len(two), len(three)] == [44, 69, 6]
    assert two[:44] == one
    assert [arrival.max_tokens for arrival in plan] == [2, 1, 25]
    # The rate's times, not the trace's.
    assert plan[1].at_s != 0.0


def test_a_trace_that_is_too_short_is_said_so() -> None:
    with pytest.raises(ConfigError, match="has 3 requests"):
        plan_arrivals(Load(4, trace="t"), TRACE)


def test_a_trace_without_times_comes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(msgspec.json.encode({"input_length": 5, "hash_ids": [1], "more": "ignored"}) + b"\n\n")
    plan = plan_arrivals(Load(1, trace=str(path)), read_request_trace(path))
    assert [(arrival.at_s, arrival.prompt_tokens, arrival.max_tokens) for arrival in plan] == [(0.0, 5, 1)]
