"""`kvferry node` runs a node of the pool; `kvferry pool` looks into one, drains or clears it."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from kvferry.config import Settings, add_flags, cluster_secret, load_settings, parse_size, parse_time
from kvferry.errors import ConfigError
from kvferry.observe import configure_logs, get_log, tell_listening
from kvferry.pool.client import PoolClient
from kvferry.pool.directory import Directory
from kvferry.pool.keys import BlockSpace
from kvferry.pool.messages import BlockStat, DrainState, Message, SpaceStat
from kvferry.pool.metrics_server import MetricsServer
from kvferry.pool.node import PoolNode
from kvferry.pool.report import blocks_text, drain_text, spaces_text, stat_text
from kvferry.pool.settings import PoolSettings

_log = get_log(__name__)
T = TypeVar("T")
ANSWER_S = 10.0
"""A drained node answers within this after its deadline, as it has yet to leave the directory."""

_NO_SPACE = BlockSpace(bytes(32))


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register `kvferry node` and `kvferry pool`."""
    node = subparsers.add_parser(
        "node",
        help="run one node of the KV pool",
        description="Keeps KV blocks in memory that this host's engines map, and on disk, while engines come and go. "
        "SIGTERM writes what is queued for the disk, then ends it.",
    )
    add_flags(node, "pool", "cluster", "log", bare=("pool",))
    node.set_defaults(run=run_node)
    pool = subparsers.add_parser("pool", help="look into a node of the KV pool, drain or clear it")
    asks = pool.add_subparsers(title="requests", metavar="REQUEST", required=True)
    for name, run, text in (
        ("stat", run_stat, "a node's figures"),
        ("ls", run_ls, "the spaces (model and namespace) that a node holds blocks of, or a namespace's hottest blocks"),
        ("drain", run_drain, "copy a node's hot blocks to others and take it out of the directory"),
        ("clear", run_clear, "forget all blocks of a namespace, or of all, on all nodes of the directory"),
    ):
        ask = asks.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        ask.add_argument("--node", required=True, metavar="URL", help="where the node listens: tcp://host:port")
        add_flags(ask, "cluster")
        if name == "clear":
            which = ask.add_mutually_exclusive_group(required=True)
            which.add_argument("--only", metavar="NAMESPACE", help="blocks of this namespace, of all models")
            which.add_argument("--all", action="store_true", help="every block")
        else:
            ask.add_argument("--json", action="store_true", help="print JSON")
        if name == "ls":
            ask.add_argument("--namespace", metavar="NAMESPACE", help="its blocks that served most often")
            ask.add_argument("--limit", type=int, default=20, metavar="N", help="blocks shown (default 20)")
        if name == "drain":
            ask.add_argument("--deadline", default="60s", metavar="TIME", help="it ends within this (default 60s)")
        ask.set_defaults(run=run)


def run_node(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises: ConfigError, PoolExhausted where the disk has no room."""
    settings = load_settings(args)
    configure_logs(settings.log, process="node")
    asyncio.run(serve(settings, cluster_secret(settings)))
    return 0


async def serve(settings: Settings, secret: bytes | None) -> None:
    """Run a node until a signal comes."""
    directory = _directory(settings.pool.directory)
    node = PoolNode(
        settings=node_settings(settings),
        listen=settings.pool.listen,
        secret=secret,
        directory=directory,
        advertise_host=settings.cluster.advertise_host,
    )
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    metrics: MetricsServer | None = None
    try:
        await node.start()
        if settings.pool.metrics_port is not None:
            metrics = MetricsServer(node.metrics, settings.pool.metrics_host, settings.pool.metrics_port)
            _log.info("metrics are served", url=await metrics.start())
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop.set)
        tell_listening(node.address)
        await stop.wait()
    finally:
        if metrics is not None:
            await metrics.close()
        await node.close()
        if directory is not None:
            await directory.close()
    _log.info("node ended", **node.counts)


def _directory(url: str | None) -> Directory | None:
    if url is None:
        return None
    try:
        from kvferry.pool.directory_redis import RedisDirectory
    except ModuleNotFoundError as error:
        raise ConfigError(f"pool.directory needs {error.name}; do: pip install 'kvferry[redis]'") from error
    return RedisDirectory(url)


def node_settings(settings: Settings) -> PoolSettings:
    """The section `pool` as a node takes it. Raises: ConfigError for a quota that is none."""
    section = settings.pool
    quotas = {}
    for text in section.quotas:
        namespace, equals, size = text.partition("=")
        try:
            quotas[namespace] = parse_size(size)
        except ValueError as error:
            raise ConfigError(f"pool.quotas: {text!r}: {error}; write NAMESPACE=SIZE, such as team-a=4GiB") from error
        if not equals or not namespace:
            raise ConfigError(f"pool.quotas: {text!r} names no namespace; write NAMESPACE=SIZE, such as team-a=4GiB")
    return PoolSettings(
        arena_bytes=section.arena_bytes,
        slab_bytes=section.slab_bytes,
        eviction=section.eviction,
        quotas=quotas,
        disk_path=section.disk_path,
        disk_bytes=section.disk_bytes,
        lease_ttl_s=section.lease_ttl_s,
        max_copies=section.max_copies,
    )


def run_stat(args: argparse.Namespace) -> int:
    """Print a node's figures. Raises: KVError if it can't be asked."""
    stat = asyncio.run(_ask(args, _NO_SPACE, PoolClient.stat))
    _print(_json(stat) if args.json else stat_text(stat))
    return 0


def run_ls(args: argparse.Namespace) -> int:
    """Print the spaces of a node, or the hottest blocks of one namespace."""
    found: Sequence[SpaceStat | BlockStat]
    if args.namespace is None:
        found = spaces = asyncio.run(_ask(args, _NO_SPACE, PoolClient.stat)).spaces
        text = spaces_text(spaces)
    else:
        space = BlockSpace(_NO_SPACE.fingerprint, args.namespace)
        found = blocks = asyncio.run(_ask(args, space, lambda client: client.served_most(args.limit)))
        text = blocks_text(blocks)
    if not args.json:
        _print(text)
    elif found:
        _print("\n".join(msgspec.json.encode(each).decode() for each in found))
    return 0


def run_drain(args: argparse.Namespace) -> int:
    """Drain a node and tell how far it is; 1 where hot blocks are left on it. Ending this command ends no drain.

    Raises: ConfigError for a deadline that is none, KVError if the node can't be asked.
    """
    try:
        deadline_s = parse_time(args.deadline)
    except ValueError as error:
        raise ConfigError(f"--deadline {args.deadline!r}: {error}") from error
    state = asyncio.run(_drain(args, deadline_s))
    _print(_json(state) if args.json else drain_text(state))
    return 1 if state.left or not state.ended else 0


def run_clear(args: argparse.Namespace) -> int:
    """Forget blocks."""
    count, spaces = asyncio.run(_clear(args))
    _print(f"{count} blocks of {spaces} spaces removed")
    return 0


async def _drain(args: argparse.Namespace, deadline_s: float) -> DrainState:
    client = _client(args, _NO_SPACE)
    await client.start()
    loop = asyncio.get_running_loop()
    give_up_s, told = loop.time() + deadline_s + ANSWER_S, -1
    try:
        state = await client.drain(deadline_s)
        while not state.ended and loop.time() < give_up_s:
            if state.hot and state.copied != told and not args.json:
                _print(drain_text(state))
                told = state.copied
            await asyncio.sleep(0.2)
            state = await client.drain(deadline_s)
        return state
    finally:
        await client.close()


async def _ask(args: argparse.Namespace, space: BlockSpace, ask: Callable[[PoolClient], Awaitable[T]]) -> T:
    client = _client(args, space)
    await client.start()
    try:
        return await ask(client)
    finally:
        await client.close()


async def _clear(args: argparse.Namespace) -> tuple[int, int]:
    spaces = await _ask(args, _NO_SPACE, PoolClient.spaces_everywhere)
    wanted = [s for s in spaces if args.all or s.namespace == args.only]
    count = 0
    for space in wanted:
        count += await _ask(args, BlockSpace(bytes.fromhex(space.fingerprint), space.namespace), PoolClient.clear)
    return count, len(wanted)


def _json(reply: Message) -> str:
    # An object with names, without the number that paired it with its request.
    named = {name: value for name, value in msgspec.structs.asdict(reply).items() if name != "id"}
    return msgspec.json.encode(named).decode()


def _client(args: argparse.Namespace, space: BlockSpace) -> PoolClient:
    return PoolClient(args.node, space, secret=cluster_secret(load_settings(args)), transports=("tcp",))


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
