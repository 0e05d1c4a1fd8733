"""`kvferry load`: load on a running router or instance, measured as a client sees it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from kvferry.cluster.client import Answer, stream_answer
from kvferry.errors import KVError, NoInstanceAvailable, PeerGone

TELL_EVERY_S = 2.0
PERCENTILES = (50, 90, 99)


class Load(msgspec.Struct, frozen=True):
    """What to send: prompts of random token ids, which no cached prefix serves, and answers of a fixed length."""

    num_requests: int = 64
    concurrency: int = 8
    prompt_tokens: int = 512
    max_tokens: int = 64
    seed: int = 0


class Spread(msgspec.Struct, frozen=True):
    """Percentiles in milliseconds."""

    p50: float
    p90: float
    p99: float


class Measured(msgspec.Struct, frozen=True):
    """What came back.

    TTFT: send to first streamed token. ITL: gaps between streamed pieces. TPOT: (latency - TTFT) / (tokens - 1).
    """

    load: Load
    duration_s: float
    requests_per_s: float
    tokens_per_s: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    tpot_ms: Spread | None
    latency_ms: Spread | None
    outcomes: dict[str, int]
    errors: dict[str, int]


async def run_load(url: str, load: Load, tell: Callable[[str], None]) -> Measured:
    """Send the whole load, at most `concurrency` requests at a time.

    Raises:
        PeerGone: nothing answers at the URL.
        NoInstanceAvailable: it serves no model.
    """
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=900, sock_connect=5), connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        model = await _model(session, url)
        rng = random.Random(load.seed)
        # Ids of bytes exist in every vocabulary, and 0 to 31 are often special.
        prompts = [[rng.randrange(32, 256) for _ in range(load.prompt_tokens)] for _ in range(load.num_requests)]
        waiting = list(enumerate(prompts))[::-1]
        answers: list[Answer] = []

        async def client() -> None:
            while waiting:
                at, prompt = waiting.pop()
                body = {"model": model, "prompt": prompt, "max_tokens": load.max_tokens, "temperature": 0}
                body |= {"ignore_eos": True}
                name = f"load-{load.seed}-{at}"
                try:
                    answers.append(await stream_answer(session, url, "/v1/completions", body, request_id=name))
                except KVError as error:
                    answers.append(Answer(name, error=error.message))

        async def tell_now_and_then() -> None:
            while True:
                await asyncio.sleep(TELL_EVERY_S)
                tell(f"{len(answers)} of {load.num_requests} answered")

        began_s = time.monotonic()
        telling = asyncio.create_task(tell_now_and_then())
        try:
            await asyncio.gather(*(client() for _ in range(min(load.concurrency, load.num_requests))))
        finally:
            telling.cancel()
        return measure(load, answers, time.monotonic() - began_s)


def measure(load: Load, answers: Sequence[Answer], duration_s: float) -> Measured:
    """The figures of a run out of its answers. Those with an error count as errors and nowhere else."""
    good = [answer for answer in answers if answer.error is None]
    gaps_s = [b - a for answer in good for a, b in zip(answer.arrivals_s, answer.arrivals_s[1:], strict=False)]
    tpots_s = [
        (answer.total_s - answer.ttft_s) / (len(answer.token_ids) - 1)
        for answer in good
        if answer.ttft_s is not None and len(answer.token_ids) > 1
    ]
    return Measured(
        load=load,
        duration_s=round(duration_s, 3),
        requests_per_s=round(len(good) / duration_s, 3),
        tokens_per_s=round(sum(len(answer.token_ids) for answer in good) / duration_s, 3),
        ttft_ms=_spread([answer.ttft_s for answer in good if answer.ttft_s is not None]),
        itl_ms=_spread(gaps_s),
        tpot_ms=_spread(tpots_s),
        latency_ms=_spread([answer.total_s for answer in good]),
        outcomes=dict(Counter((answer.outcome or "none").partition(";")[0] for answer in good)),
        errors=dict(Counter(answer.error[:200] for answer in answers if answer.error is not None)),
    )


def print_measured(measured: Measured, console: Console) -> None:
    """Figures as a table, outcomes and errors below."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms")
    for percent in PERCENTILES:
        table.add_column(f"p{percent}", justify="right")
    rows = (
        ("TTFT", measured.ttft_ms),
        ("ITL", measured.itl_ms),
        ("TPOT", measured.tpot_ms),
        ("latency", measured.latency_ms),
    )
    for name, spread in rows:
        if spread is not None:
            table.add_row(name, *(f"{value:.2f}" for value in (spread.p50, spread.p90, spread.p99)))
    console.print(table)
    outcomes = ", ".join(f"{count} {state}" for state, count in measured.outcomes.items()) or "no answer"
    console.print(
        f"{measured.requests_per_s:.2f} requests/s, {measured.tokens_per_s:.1f} tokens/s "
        f"in {measured.duration_s:.1f} s; handoffs: {outcomes}",
        highlight=False,
        soft_wrap=True,
    )
    for error, count in measured.errors.items():
        console.print(f"{count} x {error}", style="red", markup=False, soft_wrap=True)


def _spread(seconds: Sequence[float]) -> Spread | None:
    if not seconds:
        return None
    values = np.percentile(np.asarray(seconds) * 1000, PERCENTILES)
    return Spread(*(round(float(value), 3) for value in values))


async def _model(session: aiohttp.ClientSession, url: str) -> Any:
    try:
        async with session.get(url + "/v1/models") as answer:
            listed = msgspec.json.decode(await answer.read())
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
        raise PeerGone(f"{url}/v1/models does not answer: {error or type(error).__name__}; is it running?") from error
    if not isinstance(listed, dict) or not listed.get("data"):
        raise NoInstanceAvailable(f"{url} serves no model yet; start instances that join it")
    return listed["data"][0]["id"]
