"""`kvferry router`: the OpenAI-compatible front as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
from contextlib import suppress
from typing import Any

import uvloop

from kvferry.config import Settings, add_flags, cluster_secret, load_settings
from kvferry.observe import configure_logs, tell_listening
from kvferry.router.app import Router


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register `kvferry router`."""
    parser = subparsers.add_parser(
        "router",
        help="run the OpenAI-compatible router",
        description="Takes OpenAI's requests, gives each to a prefill and a decode instance, and streams the answer "
        "through. Instances register by themselves (cluster.router_url); others are named with --prefill and "
        "--decode as URL or URL,handoff=tcp://host:port.",
    )
    add_flags(parser, "router", "cluster", "handoff", "log", bare=("router",))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises: ConfigError."""
    settings = load_settings(args)
    configure_logs(settings.log, process="router")
    uvloop.run(serve(settings, cluster_secret(settings)))
    return 0


async def serve(settings: Settings, secret: bytes | None) -> None:
    """Run a router until a signal comes; a second one ends it at once."""
    _allow_many_connections()
    router = Router(settings, secret)
    await router.start()
    tell_listening(router.url)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    await stop.wait()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(signum)
    await router.close()


def _allow_many_connections() -> None:
    """Raise the soft limit of open files to the hard one: each request holds up to three sockets."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
