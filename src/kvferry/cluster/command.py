"""`kvferry up`, `kvferry demo`, `kvferry top` and `kvferry load`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shlex
import shutil
import signal
import sys
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from kvferry.cluster.arrivals import Load
from kvferry.cluster.demo import print_rows, run_demo
from kvferry.cluster.instances import VllmOptions
from kvferry.cluster.live import show_live
from kvferry.cluster.load import print_measured, run_load
from kvferry.cluster.local import ClusterPlan, LocalCluster
from kvferry.cluster.router_view import RouterView
from kvferry.config import Settings, add_flags, load_settings, parse_time
from kvferry.errors import ConfigError, PeerGone

MAX_DEMO_REQUESTS = 500
"""The router remembers about so many ended requests, and the demo reads all of its own there."""

_OF_EACH_INSTANCE = ("engine.model", "engine.instance_id", "engine.role", "engine.port", "engine.pool")
"""Given as --model and --pool, or decided for each instance by the cluster itself."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the four commands."""
    up = subparsers.add_parser(
        "up",
        help="start a cluster on this machine and show it until Ctrl-C",
        description="Start a router and instances on this machine, show them, and end all of them on Ctrl-C.",
    )
    _add_counts(up)
    up.add_argument("--port", type=_port, default=None, help="port of the router (default: router.port, 8000)")
    up.add_argument("--model", default=None, help="path or Hugging Face name (default: the model of the demo)")
    up.add_argument(
        "--pool",
        action="append",
        metavar="URL",
        help="a node of the KV pool that all instances use, tcp://host:port; may be given again for further nodes",
    )
    up.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="engine of all instances"
    )
    up.add_argument(
        "--vllm", metavar="COMMAND", default=None, help="how to call vLLM (default: vllm beside this Python)"
    )
    up.add_argument("--vllm-args", metavar="ARGS", default="", help="further arguments of `vllm serve`, in one text")
    up.add_argument(
        "--port-base", type=_port, default=None, help="first port of vLLM instances (default: any that fit)"
    )
    up.add_argument("--share-gpus", action="store_true", help="let several instances use one GPU")
    up.add_argument("--logs", type=Path, default=None, metavar="DIR", help="keep the logs of all processes here")
    own = ("router.port", "cluster.router_url", *_OF_EACH_INSTANCE)
    add_flags(up, "router", "engine", "handoff", "transfer", "cluster", "log", without=own)
    up.set_defaults(run=run_up)

    demo = subparsers.add_parser(
        "demo",
        help="start a small cluster, run a few requests through it and check them",
        description="Start a router, prefill and decode instances and a single one; send the same requests both ways; "
        "exit with 0 only if all tokens are equal and no request was recomputed or failed.",
    )
    _add_counts(demo)
    demo.add_argument("--requests", type=_count, default=6, metavar="N", help="how many (default: %(default)s)")
    demo.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    demo.add_argument("--model", default=None, help="path or Hugging Face name (default: the model of the demo)")
    add_flags(demo, "engine", "handoff", "transfer", "log", without=_OF_EACH_INSTANCE)
    demo.set_defaults(run=run_the_demo)

    top = subparsers.add_parser(
        "top",
        help="show instances and requests of a running router",
        description="Show instances and requests of a running router until Ctrl-C.",
    )
    top.add_argument("url", nargs="?", help="http URL of the router (default: cluster.router_url, or router.port here)")
    top.set_defaults(run=run_top)

    load = subparsers.add_parser(
        "load",
        help="put load on a running router and measure what its clients see",
        description="Send random prompts, or prompts of a trace's lengths and shared prefixes, to a running router or "
        "instance; print TTFT, ITL, TPOT and latency.",
    )
    load.add_argument(
        "url", nargs="*", help="http URL (default: cluster.router_url, or router.port here); several get it in turns"
    )
    for name, default, text in (
        ("requests", 64, "how many"),
        ("concurrency", 8, "requests at a time"),
        ("prompt-tokens", 512, "length of each prompt"),
        ("max-tokens", 64, "length of each answer"),
    ):
        load.add_argument(f"--{name}", type=_amount, default=default, metavar="N", help=f"{text} (default: {default})")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts and times (default: 0)")
    load.add_argument(
        "--rate", type=_above_zero, metavar="R", help="requests a second at random times, answered or not"
    )
    load.add_argument("--trace", metavar="FILE", help="lengths, prefixes and (without --rate) times of these requests")
    load.add_argument(
        "--scale", type=_above_zero, default=1.0, metavar="F", help="of the trace's lengths (default: %(default)g)"
    )
    load.add_argument("--ttft-limit", type=_time, metavar="TIME", help="a request with a later first token is not good")
    load.add_argument("--tpot-limit", type=_time, metavar="TIME", help="one with more time a token is not good")
    load.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    load.set_defaults(run=run_the_load)


def run_up(args: argparse.Namespace) -> int:
    """`kvferry up`: 0 after Ctrl-C, 2 when the router dies."""
    settings = _with(load_settings(args), model=args.model, port=args.port, pool=args.pool)
    plan = ClusterPlan(
        args.prefill,
        args.decode,
        settings,
        engine=args.engine,
        vllm=VllmOptions(
            _vllm_command(args.vllm) if args.engine == "vllm" else (), _words("--vllm-args", args.vllm_args)
        ),
        share_gpus=args.share_gpus,
        logs_dir=args.logs,
        port_base=args.port_base,
    )
    return _run_until_signal(_up(plan, Console()))


def run_the_demo(args: argparse.Namespace) -> int:
    """`kvferry demo`: 0 only if every request was delivered with the tokens of a single instance."""
    if args.requests > MAX_DEMO_REQUESTS:
        raise ConfigError(f"--requests {args.requests}: at most {MAX_DEMO_REQUESTS}")
    settings = _with(load_settings(args), model=args.model, port=0, pool=())
    console = Console()

    async def demo() -> int:
        report, rows = await run_demo(ClusterPlan(args.prefill, args.decode, settings), args.requests, console)
        print_rows(rows, report, console)
        if args.json:
            sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
        return 0 if report.is_good else 1

    return _run_until_signal(demo(), interrupted=130)


def run_top(args: argparse.Namespace) -> int:
    """`kvferry top`: 0 after Ctrl-C."""
    url = _url(args, args.url)

    async def show() -> int:
        async with RouterView(url) as router:
            await router.instances()
            await show_live(router, Console(), hint="Ctrl-C ends this view; the cluster runs on")
        return 0

    return _run_until_signal(show())


def run_the_load(args: argparse.Namespace) -> int:
    """`kvferry load`: 0 only if every request was answered."""
    load = Load(
        args.requests,
        args.concurrency,
        args.prompt_tokens,
        args.max_tokens,
        args.seed,
        args.rate,
        args.trace,
        args.scale,
        args.ttft_limit,
        args.tpot_limit,
    )
    urls = [_url(args, url) for url in args.url or [None]]
    console = Console()

    async def measure() -> int:
        measured = await run_load(urls, load, lambda line: console.print(line, style="dim", highlight=False))
        print_measured(measured, console)
        if args.json:
            sys.stdout.write(msgspec.json.encode(measured).decode() + "\n")
        return 1 if measured.errors else 0

    return _run_until_signal(measure(), interrupted=130)


async def _up(plan: ClusterPlan, console: Console) -> int:
    def tell(line: str) -> None:
        console.print(escape(line), highlight=False, soft_wrap=True)

    cluster = LocalCluster(plan, tell)
    deaths: list[str] = []
    clean = False
    try:
        count = f"{plan.num_prefill} prefill and {plan.num_decode} decode instances ({plan.engine})"
        tell(f"starting a router, {count}; logs in {cluster.logs_dir}")
        await cluster.start()
        tell(f"ready: OpenAI API at {cluster.router_url}/v1")
        ends = f"Ctrl-C ends all {len(cluster.children)} processes"
        hint = f"OpenAI API: {cluster.router_url}/v1   logs: {cluster.logs_dir}   {ends}"
        async with RouterView(cluster.router_url) as router:
            check = _watch(cluster, deaths, tell)
            await show_live(router, console, hint=hint, children=cluster.children, check=check)
        clean = not deaths
    except asyncio.CancelledError:
        clean = not deaths
        raise
    finally:
        if console.is_terminal:
            # The live table covered these lines when they were news.
            for death in deaths:
                tell(death)
        if cluster.children:
            tell(f"stopping {len(cluster.children)} processes")
        clean = clean or not cluster.children
        await cluster.stop(keep_logs=not clean)
        if cluster.children:
            tell("all of them have ended" + ("" if clean else f"; their logs are in {cluster.logs_dir}"))
    return 0


def _watch(cluster: LocalCluster, deaths: list[str], tell: Callable[[str], None]) -> Callable[[], None]:
    """A check that ends everything when the router dies; of an instance that has died it says so once and notes it."""
    told: set[str] = set()

    def check() -> None:
        for child in cluster.children:
            if not child.has_died or child.name in told:
                continue
            if child.name == "router":
                raise PeerGone(child.why_it_died(), peer="router")
            told.add(child.name)
            deaths.append(child.why_it_died())
            tell(deaths[-1])

    return check


def _run_until_signal(work: Coroutine[Any, Any, int], *, interrupted: int = 0) -> int:
    """Run to the end, or until SIGINT, SIGTERM or SIGHUP: then let the work clean up. A second signal does not wait."""

    async def run() -> int:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

        def stop() -> None:
            task.cancel()
            for number in signals:
                # The children end with this process, so that the default action is a clean, if abrupt, end.
                loop.remove_signal_handler(number)

        for number in signals:
            loop.add_signal_handler(number, stop)
        with contextlib.suppress(asyncio.CancelledError):
            return await task
        return interrupted

    return asyncio.run(run())


def _add_counts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefill", type=_count, default=1, metavar="X", help="prefill instances (default: %(default)s)"
    )
    parser.add_argument("--decode", type=_count, default=1, metavar="Y", help="decode instances (default: %(default)s)")


def _with(settings: Settings, *, model: str | None, port: int | None, pool: Sequence[str] | None) -> Settings:
    replace = msgspec.structs.replace
    if pool is not None:
        settings = replace(settings, engine=replace(settings.engine, pool=tuple(pool)))
    if model is not None:
        if model.startswith(("/", "./", "../")) and not Path(model).is_dir():
            raise ConfigError(f"--model: there is no directory {model}")
        settings = replace(settings, engine=replace(settings.engine, model=model))
    if port is not None:
        settings = replace(settings, router=replace(settings.router, port=port))
    return settings


def _words(flag: str, text: str) -> tuple[str, ...]:
    """A text as a shell would split it. Raises: ConfigError for a quotation without its end."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: {error}") from error


def _vllm_command(given: str | None) -> tuple[str, ...]:
    """How vLLM is called: as told, else the `vllm` beside this Python, else the one in PATH.

    Raises:
        ConfigError: there is none.
    """
    if given is not None:
        return _words("--vllm", given)
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise ConfigError(f"--engine vllm: there is no vllm beside {sys.executable} nor in PATH; name it with --vllm")
    return (found,)


def _url(args: argparse.Namespace, given: str | None) -> str:
    """The router's URL as given, else from the settings."""
    settings = load_settings(args)
    url: str = given or settings.cluster.router_url or f"http://{settings.router.host}:{settings.router.port}"
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{url!r} is no URL of a router; expected http://host:port")
    return url.rstrip("/").removesuffix("/v1")


def _between(low: int, high: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,9}", text, re.ASCII) is None or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return parse


_amount, _count, _port = _between(1, 1_000_000), _between(1, 1024), _between(0, 65535)


def _above_zero(text: str) -> float:
    """The type of a flag that takes a number above zero."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text, re.ASCII) is None or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero, such as 0.5 or 12")
    return float(text)


def _time(text: str) -> float:
    """The type of a flag that takes a time, in seconds."""
    try:
        return parse_time(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
