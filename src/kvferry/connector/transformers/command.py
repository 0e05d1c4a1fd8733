"""`kvferry engine`: one instance of the embedded engine. Needs the extra `engine` only when it runs."""

from __future__ import annotations

import argparse
import asyncio
import gc
from typing import Any

from kvferry.config import add_flags, load_settings
from kvferry.observe import configure_logs


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand `engine`."""
    parser = subparsers.add_parser(
        "engine",
        help="run one instance of the embedded engine",
        description=(
            "Run one instance of the embedded engine in the foreground. It binds first, then tells its URL on standard "
            "output and registers at the router, if --cluster-router-url names one."
        ),
    )
    add_flags(parser, "engine", "handoff", "transfer", "cluster", "log", bare=("engine",))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. Returns the exit status."""
    settings = load_settings(args)
    configure_logs(settings.log, process=settings.engine.instance_id or f"engine-{settings.engine.role}")
    gc.disable()  # What torch and transformers make of themselves stays, and looking through it costs a second.
    from kvferry.connector.transformers.instance import EngineInstance

    gc.enable()

    async def serve() -> None:
        await EngineInstance(settings).serve()

    asyncio.run(serve())
    return 0
