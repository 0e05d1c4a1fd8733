"""Which requests a load sends, and when: a pure plan, the same for every system that it is put on."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from kvferry.errors import ConfigError
from kvferry.request_trace import BLOCK_TOKENS, TracedRequest


class Load(msgspec.Struct, frozen=True):
    """What to send.

    Prompts are of random token ids: `prompt_tokens` each, which no cached prefix serves; or, with a trace, of its
    lengths times `scale`, where equal `hash_ids` are equal tokens, answered by so many tokens as the trace says times
    `scale`. Sent at most `concurrency` at a time; or, with a `rate` in requests a second, whether the earlier ones were
    answered or not (Poisson arrivals), as a trace's are at its own times if there is no rate.

    `ttft_limit_s` and `tpot_limit_s` are what a request must keep to count as good.
    """

    num_requests: int = 64
    concurrency: int = 8
    prompt_tokens: int = 512
    max_tokens: int = 64
    seed: int = 0
    rate: float | None = None
    trace: str | None = None
    scale: float = 1.0
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None


class Arrival(msgspec.Struct, frozen=True):
    """One request: `at_s` after the beginning, or as soon as one of `concurrency` is free where it is None.

    The prompt is the first `prompt_tokens` of its blocks' tokens; see `tokens_of`.
    """

    at_s: float | None
    blocks: tuple[int, ...]
    block_tokens: int
    prompt_tokens: int
    max_tokens: int


def plan_arrivals(load: Load, trace: Sequence[TracedRequest] = ()) -> list[Arrival]:
    """The requests of a load in the order of their sending.

    Raises: ConfigError if the trace has fewer requests than the load.
    """
    if not load.trace:
        size = load.prompt_tokens
        requests = [Arrival(None, (number,), size, size, load.max_tokens) for number in range(load.num_requests)]
    elif len(trace) < load.num_requests:
        raise ConfigError(f"the trace {load.trace} has {len(trace)} requests; ask for so many at most")
    else:
        began_ms = trace[0].timestamp
        requests = [_scaled(line, load.scale, began_ms) for line in trace[: load.num_requests]]
    if load.rate is None:
        return requests
    rng, at_s, timed = random.Random(load.seed), 0.0, list[Arrival]()
    for request in requests:
        timed.append(msgspec.structs.replace(request, at_s=at_s))
        at_s += rng.expovariate(load.rate)
    return timed


def tokens_of(arrival: Arrival, seed: int) -> list[int]:
    """The prompt's token ids, equal for equal blocks."""
    tokens: list[int] = []
    for block in arrival.blocks:
        # Ids of bytes exist in every vocabulary, and 0 to 31 are often special.
        tokens += random.Random(f"{seed}/{block}").choices(range(32, 256), k=arrival.block_tokens)
    return tokens[: arrival.prompt_tokens]


def _scaled(line: TracedRequest, scale: float, began_ms: float) -> Arrival:
    block_tokens = max(1, round(BLOCK_TOKENS * scale))
    room = block_tokens * len(line.hash_ids)
    return Arrival(
        (line.timestamp - began_ms) / 1000,
        line.hash_ids,
        block_tokens,
        min(room, max(1, round(line.input_length * scale))),
        max(1, round(line.output_length * scale)),
    )
