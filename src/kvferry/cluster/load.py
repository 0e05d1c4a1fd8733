"""`kvferry load`: load on a running router or instance, measured as a client sees it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from kvferry.cluster.arrivals import Load, plan_arrivals, tokens_of
from kvferry.cluster.client import Answer, stream_answer
from kvferry.errors import KVError, NoInstanceAvailable, PeerGone
from kvferry.request_trace import read_request_trace

TELL_EVERY_S = 2.0
MADE_BEFORE_S = 0.5
PERCENTILES = (50, 90, 99)


class Spread(msgspec.Struct, frozen=True):
    """Percentiles in milliseconds."""

    p50: float
    p90: float
    p99: float


class Measured(msgspec.Struct, frozen=True):
    """What came back.

    TTFT: send to first streamed token. ITL: gaps between streamed pieces. TPOT: (latency - TTFT) / (tokens - 1).
    `good`: requests that were answered within the load's limits; `goodput_per_s` so many a second. `late_ms`: how much
    later than planned requests were sent; where it is not small, the sender was too slow for the rate.
    """

    load: Load
    duration_s: float
    requests_per_s: float
    tokens_per_s: float
    good: int
    goodput_per_s: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    tpot_ms: Spread | None
    latency_ms: Spread | None
    late_ms: Spread | None
    outcomes: dict[str, int]
    errors: dict[str, int]


async def run_load(urls: Sequence[str], load: Load, tell: Callable[[str], None]) -> Measured:
    """Send the whole load to these servers in turns, and wait for all answers.

    Raises:
        ConfigError: its trace can't be read.
        PeerGone: nothing answers at a URL.
        NoInstanceAvailable: a server serves no model.
    """
    arrivals = plan_arrivals(load, read_request_trace(Path(load.trace)) if load.trace else ())
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=900, sock_connect=5), connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        servers = [(url, await _model(session, url)) for url in urls]
        answers: list[Answer] = []
        late_s: list[float] = []

        async def send(number: int) -> None:
            arrival, (url, model) = arrivals[number], servers[number % len(servers)]
            body = {"model": model, "prompt": tokens_of(arrival, load.seed), "max_tokens": arrival.max_tokens}
            body |= {"temperature": 0, "ignore_eos": True}
            name = f"load-{load.seed}-{number}"
            if arrival.at_s is not None:
                await asyncio.sleep(began_s + arrival.at_s - time.monotonic())
                late_s.append(time.monotonic() - began_s - arrival.at_s)
            try:
                answers.append(await stream_answer(session, url, "/v1/completions", body, request_id=name))
            except KVError as error:
                answers.append(Answer(name, error=error.message))

        async def send_in_turn() -> None:
            while waiting:
                await send(waiting.pop())

        async def send_in_time() -> None:
            # Each is made a little before it is due, so that a long trace is not in memory at once.
            async with asyncio.TaskGroup() as sending:
                for number in timed:
                    await asyncio.sleep(began_s + (arrivals[number].at_s or 0.0) - MADE_BEFORE_S - time.monotonic())
                    sending.create_task(send(number))

        async def tell_now_and_then() -> None:
            while True:
                await asyncio.sleep(TELL_EVERY_S)
                tell(f"{len(answers)} of {load.num_requests} answered")

        timed = [number for number, arrival in enumerate(arrivals) if arrival.at_s is not None]
        waiting = [number for number, arrival in enumerate(arrivals) if arrival.at_s is None][::-1]
        began_s = time.monotonic()
        telling = asyncio.create_task(tell_now_and_then())
        try:
            in_turn = [send_in_turn() for _ in range(min(load.concurrency, len(waiting)))]
            await asyncio.gather(send_in_time(), *in_turn)
        finally:
            telling.cancel()
        return measure(load, answers, time.monotonic() - began_s, late_s)


def measure(load: Load, answers: Sequence[Answer], duration_s: float, late_s: Sequence[float] = ()) -> Measured:
    """The figures of a run out of its answers. Those with an error count as errors and nowhere else."""
    whole = [answer for answer in answers if answer.error is None]
    gaps_s = [b - a for answer in whole for a, b in zip(answer.arrivals_s, answer.arrivals_s[1:], strict=False)]
    good = sum(is_good(answer, load) for answer in answers)
    return Measured(
        load=load,
        duration_s=round(duration_s, 3),
        requests_per_s=round(len(whole) / duration_s, 3),
        tokens_per_s=round(sum(len(answer.token_ids) for answer in whole) / duration_s, 3),
        good=good,
        goodput_per_s=round(good / duration_s, 3),
        ttft_ms=_spread([answer.ttft_s for answer in whole if answer.ttft_s is not None]),
        itl_ms=_spread(gaps_s),
        tpot_ms=_spread([tpot_s for answer in whole if (tpot_s := _tpot_s(answer)) is not None]),
        latency_ms=_spread([answer.total_s for answer in whole]),
        late_ms=_spread(late_s),
        outcomes=dict(Counter((answer.outcome or "none").partition(";")[0] for answer in whole)),
        errors=dict(Counter(answer.error[:200] for answer in answers if answer.error is not None)),
    )


def is_good(answer: Answer, load: Load) -> bool:
    """It was answered whole and kept the load's limits; without limits, every whole answer is good."""
    if answer.error is not None or answer.ttft_s is None:
        return False
    tpot_s = _tpot_s(answer)
    in_time = load.ttft_limit_s is None or answer.ttft_s <= load.ttft_limit_s
    return in_time and (load.tpot_limit_s is None or tpot_s is None or tpot_s <= load.tpot_limit_s)


def _tpot_s(answer: Answer) -> float | None:
    if answer.ttft_s is None or len(answer.token_ids) < 2:
        return None
    return (answer.total_s - answer.ttft_s) / (len(answer.token_ids) - 1)


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
        ("sent late", measured.late_ms),
    )
    for name, spread in rows:
        if spread is not None:
            table.add_row(name, *(f"{value:.2f}" for value in (spread.p50, spread.p90, spread.p99)))
    console.print(table)
    load = measured.load
    limited = load.ttft_limit_s is not None or load.tpot_limit_s is not None
    limits = f"{measured.good} within the limits, {measured.goodput_per_s:.2f} a second; " if limited else ""
    outcomes = ", ".join(f"{count} {state}" for state, count in measured.outcomes.items()) or "no answer"
    console.print(
        f"{measured.requests_per_s:.2f} requests/s, {measured.tokens_per_s:.1f} tokens/s "
        f"in {measured.duration_s:.1f} s; {limits}handoffs: {outcomes}",
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
