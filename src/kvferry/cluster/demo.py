"""`kvferry demo`: a few requests through a prefill and a decode instance, compared with an instance that does both."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvferry.cluster.client import Answer, stream_answer
from kvferry.cluster.local import ClusterPlan, LocalCluster
from kvferry.cluster.router_view import EndedRequest, RouterView
from kvferry.errors import KVError
from kvferry.types import TerminalState

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MAX_TOKENS = 64
NUM_SHOWN = 6
NUM_AT_ONCE = 8
RECORD_WAIT_S = 3.0
TELL_EVERY_S = 2.0

EMMA = (
    "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, seemed to unite some "
    "of the best blessings of existence; and had lived nearly twenty-one years in the world with very little to "
    "distress or vex her. She was the youngest of the two daughters of a most affectionate, indulgent father; and had, "
    "in consequence of her sister's marriage, been mistress of his house from a very early period. Her mother had died"
)
PROMPTS: tuple[tuple[str, str], ...] = (
    (CHAT, "What is a ferry?"),
    (CHAT, "请背诵李白的《静夜思》。"),
    (CHAT, "What does 🚢 mean?"),
    (TEXT, EMMA),
    (CHAT, "🐼是什么意思？"),
    (TEXT, "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be"),
)


class Report(msgspec.Struct, frozen=True):
    """What the demo found; the object of `--json`. Times in milliseconds, None where nothing was measured."""

    prefill: int
    decode: int
    requests: int
    tokens_equal: bool
    delivered: int
    recomputed: int
    aborted: int
    failed: int
    handoff_bytes: int
    handoff_ms_p50: float | None
    ttft_ms_p50: float | None
    tokens: int
    transports: list[str]

    @property
    def is_good(self) -> bool:
        """Every request delivered by a handoff, with the tokens of a single instance."""
        return self.tokens_equal and self.delivered == self.requests


@dataclass(frozen=True)
class Row:
    """One request: what the client got, what the router recorded, what a single instance answers."""

    prompt: str
    answer: Answer
    record: EndedRequest | None
    single: Answer

    @property
    def is_equal(self) -> bool:
        return (
            self.answer.error is None
            and self.single.error is None
            and bool(self.answer.token_ids)
            and self.answer.token_ids == self.single.token_ids
            and self.answer.text == self.single.text
        )


async def run_demo(plan: ClusterPlan, num_requests: int, console: Console) -> tuple[Report, list[Row]]:
    """Start a cluster and an instance that stands alone, send requests to both, stop them, and compare.

    Raises:
        KVError: the cluster did not start.
    """
    began_s = time.monotonic()

    def tell(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/]  {escape(line)}", highlight=False, soft_wrap=True)

    cluster = LocalCluster(plan, tell, num_alone=1)
    good = False
    try:
        tell(f"starting a router, {plan.num_prefill} prefill and {plan.num_decode} decode instances, and a single one")
        # The single instance loads its model while the cluster does.
        _, single_url = await asyncio.gather(cluster.start(), cluster.start_alone("single"))
        tell("all of them serve")
        async with _session() as session:
            prompts = _prompts(num_requests)
            bodies = await _bodies(session, cluster.router_url, prompts)
            console.print()
            answers = await _ask(session, cluster.router_url, bodies, console, tell)
            records = await _records(cluster.router_url, answers)
            tell("the same requests to the single instance")
            singles = await _gather_quietly(session, single_url, bodies, "single", 0, tell)
        cluster.check()
        rows = [
            Row(prompt, answer, records.get(answer.request_id), single)
            for (_, prompt), answer, single in zip(prompts, answers, singles, strict=True)
        ]
        report = _report(plan, rows)
        good = report.is_good
    finally:
        await cluster.stop(keep_logs=not good)
        if not good:
            tell(f"logs of every process: {cluster.logs_dir}")
    return report, rows


def print_rows(rows: Sequence[Row], report: Report, console: Console) -> None:
    """The table of requests, and what went wrong if anything did."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("request", no_wrap=True, overflow="ellipsis", width=10 if console.width < 100 else 30)
    for name in ("tokens", "queue", "prefill", "handoff", "after", "decode", "TTFT", "KV KiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    table.add_column("=", justify="center")
    for row in rows[:24]:
        record, answer = row.record, row.answer
        stages = record.stages if record is not None else {}
        table.add_row(
            escape(row.prompt.replace("\n", " ")),
            f"{answer.num_prompt_tokens}+{len(answer.token_ids)}",
            _ms(stages.get("queue")),
            _ms(stages.get("prefill")),
            _ms(record.handoff_s if record is not None else None),
            _ms(stages.get("handoff")),
            _ms(stages.get("decode")),
            _ms(answer.ttft_s),
            f"{record.handoff_bytes / 1024:,.0f}" if record is not None else "",
            _ended(record),
            "[green]yes[/]" if row.is_equal else "[bold red]no[/]",
        )
    console.print()
    console.print(table)
    if len(rows) > 24:
        console.print(f"... and {len(rows) - 24} more")
    console.print(
        "[dim]Times in ms. tokens: prompt + answer. handoff: from D's subscription at P to its verdict, beside the "
        "prefill; after: what of it came after the prefill. =: the tokens are those of the single instance.[/]",
        highlight=False,
    )
    for row in rows:
        if row.is_equal and row.record is not None and row.record.state is TerminalState.DELIVERED:
            continue
        why = row.answer.error or row.single.error or _why(row)
        console.print(f"[red]{row.answer.request_id}[/]: {escape(why)}", soft_wrap=True)
    by = f" over {', '.join(report.transports)}" if report.transports else ""
    console.print(
        f"\n{report.delivered} of {report.requests} delivered, {report.recomputed} recomputed, {report.failed} failed; "
        f"{report.handoff_bytes:,} bytes of KV cache handed over{by}; "
        + ("[green]all tokens equal a single instance's[/]" if report.tokens_equal else "[bold red]tokens differ[/]"),
        highlight=False,
        soft_wrap=True,
    )


def _why(row: Row) -> str:
    if row.record is None:
        return "the router has no record of it"
    if row.record.state is not TerminalState.DELIVERED:
        told = (row.record.stage, row.record.cause, row.record.detail)
        return f"{row.record.state}: " + ", ".join(part for part in told if part)
    pairs = zip(row.answer.token_ids, row.single.token_ids, strict=False)
    at = next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(row.answer.token_ids), len(row.single.token_ids))
    )
    return (
        f"tokens differ from the single instance's at {at}: "
        f"{row.answer.token_ids[at : at + 5]} and {row.single.token_ids[at : at + 5]}"
    )


def _ended(record: EndedRequest | None) -> str:
    if record is None:
        return "[red]unknown[/]"
    colour = "green" if record.state is TerminalState.DELIVERED else "red"
    return f"[{colour}]{record.state}[/]"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.1f}"


def _report(plan: ClusterPlan, rows: Sequence[Row]) -> Report:
    records = [row.record for row in rows if row.record is not None]
    states = [record.state for record in records]
    handoffs_s = [record.handoff_s for record in records if record.handoff_s is not None]
    ttfts_s = [row.answer.ttft_s for row in rows if row.answer.ttft_s is not None]
    known = {state: states.count(state) for state in TerminalState}
    return Report(
        prefill=plan.num_prefill,
        decode=plan.num_decode,
        requests=len(rows),
        tokens_equal=all(row.is_equal for row in rows),
        delivered=known[TerminalState.DELIVERED],
        recomputed=known[TerminalState.RECOMPUTED],
        aborted=known[TerminalState.ABORTED],
        # A request of which the router knows no end has failed too.
        failed=known[TerminalState.FAILED] + len(rows) - len(records),
        handoff_bytes=sum(record.handoff_bytes for record in records),
        handoff_ms_p50=_median_ms(handoffs_s),
        ttft_ms_p50=_median_ms(ttfts_s),
        tokens=sum(len(row.answer.token_ids) for row in rows),
        transports=sorted({record.transport for record in records if record.transport}),
    )


def _median_ms(seconds: Sequence[float]) -> float | None:
    return round(statistics.median(seconds) * 1000, 3) if seconds else None


def _prompts(num_requests: int) -> list[tuple[str, str]]:
    """As many as asked for; from the second round on a number makes each new, so that no cached prefix serves it."""
    rounds = [PROMPTS[i % len(PROMPTS)] for i in range(num_requests)]
    again = [i // len(PROMPTS) for i in range(num_requests)]
    return [(path, f"{n + 1}. {prompt}" if n else prompt) for (path, prompt), n in zip(rounds, again, strict=True)]


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300, sock_connect=5))


async def _bodies(
    session: aiohttp.ClientSession, url: str, prompts: Sequence[tuple[str, str]]
) -> list[tuple[str, dict[str, Any]]]:
    async with session.get(url + "/v1/models") as answer:
        model = (await answer.json())["data"][0]["id"]
    common = {"model": model, "max_tokens": MAX_TOKENS, "temperature": 0}
    return [
        (
            path,
            {**common, "messages": [{"role": "user", "content": text}]} if path == CHAT else {**common, "prompt": text},
        )
        for path, text in prompts
    ]


async def _ask(
    session: aiohttp.ClientSession,
    url: str,
    bodies: Sequence[tuple[str, dict[str, Any]]],
    console: Console,
    tell: Callable[[str], None],
) -> list[Answer]:
    """The first few one after the other with their text, the others several at a time."""
    answers = []

    def show(text: str) -> None:
        console.out(text, end="", highlight=False)
        console.file.flush()

    for at, (path, body) in enumerate(bodies[:NUM_SHOWN]):
        prompt = body["messages"][0]["content"] if path == CHAT else body["prompt"]
        console.print(f"[bold cyan]{escape(prompt)}[/]", end="\n" if path == CHAT else "", soft_wrap=True)
        try:
            answer = await stream_answer(session, url, path, body, request_id=f"demo-{at}", show=show)
        except KVError as error:
            answer = Answer(f"demo-{at}", error=str(error))
        console.print(f"\n[red]{escape(answer.error)}[/]\n" if answer.error else "\n", soft_wrap=True)
        answers.append(answer)
    if len(bodies) > NUM_SHOWN:
        tell(f"{len(bodies) - NUM_SHOWN} more requests, {NUM_AT_ONCE} at a time")
        answers += await _gather_quietly(session, url, bodies[NUM_SHOWN:], "demo", NUM_SHOWN, tell)
    return answers


async def _gather_quietly(
    session: aiohttp.ClientSession,
    url: str,
    bodies: Sequence[tuple[str, dict[str, Any]]],
    name: str,
    first: int,
    tell: Callable[[str], None],
) -> list[Answer]:
    places = asyncio.Semaphore(NUM_AT_ONCE)
    num_done = 0

    async def ask(at: int, path: str, body: dict[str, Any]) -> Answer:
        nonlocal num_done
        async with places:
            try:
                answer = await stream_answer(session, url, path, body, request_id=f"{name}-{at}")
            except KVError as error:
                answer = Answer(f"{name}-{at}", error=str(error))
        num_done += 1
        return answer

    async def tell_now_and_then() -> None:
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            tell(f"{num_done} of {len(bodies)} answered")

    telling = asyncio.create_task(tell_now_and_then())
    try:
        return await asyncio.gather(*(ask(first + at, path, body) for at, (path, body) in enumerate(bodies)))
    finally:
        telling.cancel()


async def _records(url: str, answers: Sequence[Answer]) -> dict[str, EndedRequest]:
    """The router's records of these requests; its last ones may come a moment after the last byte."""
    wanted = {answer.request_id for answer in answers}
    give_up_s = time.monotonic() + RECORD_WAIT_S
    async with RouterView(url) as router:
        while True:
            found = {record.request: record for record in (await router.requests()).recent if record.request in wanted}
            if len(found) == len(wanted) or time.monotonic() > give_up_s:
                return found
            await asyncio.sleep(0.05)
