"""`kvferry node` runs a node of the pool; `kvferry pool` looks into one, or clears it."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from typing import Any

import msgspec

from kvferry.config import Settings, add_flags, cluster_secret, load_settings, parse_size
from kvferry.errors import ConfigError
from kvferry.observe import configure_logs, get_log, tell_listening
from kvferry.pool.client import PoolClient
from kvferry.pool.directory import Directory
from kvferry.pool.keys import BlockSpace
from kvferry.pool.messages import NodeStat, SpaceStat
from kvferry.pool.node import PoolNode
from kvferry.pool.settings import PoolSettings

_log = get_log(__name__)
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
    pool = subparsers.add_parser("pool", help="look into a node of the KV pool, or clear it")
    asks = pool.add_subparsers(title="requests", metavar="REQUEST", required=True)
    for name, run, text in (
        ("stat", run_stat, "a node's figures"),
        ("ls", run_ls, "the spaces (model and namespace) that a node holds blocks of"),
        ("clear", run_clear, "forget all blocks of a namespace, or of all"),
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
    try:
        await node.start()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop.set)
        tell_listening(node.address)
        await stop.wait()
    finally:
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
    )


def run_stat(args: argparse.Namespace) -> int:
    """Print a node's figures. Raises: KVError if it can't be asked."""
    stat = asyncio.run(_stat(args))
    _print(msgspec.json.encode(stat).decode() if args.json else describe(stat))
    return 0


def run_ls(args: argparse.Namespace) -> int:
    """Print the spaces of a node."""
    spaces = asyncio.run(_stat(args)).spaces
    if args.json:
        _print("\n".join(msgspec.json.encode(space).decode() for space in spaces))
        return 0
    rows = [f"{s.namespace:<24} {s.fingerprint[:16]:<18} {s.blocks:>9} {s.host_bytes / 2**20:>12.1f}" for s in spaces]
    _print("\n".join([f"{'namespace':<24} {'fingerprint':<18} {'blocks':>9} {'host MiB':>12}", *rows]))
    return 0


def run_clear(args: argparse.Namespace) -> int:
    """Forget blocks."""
    count, spaces = asyncio.run(_clear(args))
    _print(f"{count} blocks of {spaces} spaces removed")
    return 0


def describe(stat: NodeStat) -> str:
    """The figures as lines for a person."""
    used = stat.num_slabs - stat.free_slabs
    lines = [
        f"{stat.address}: {used} of {stat.num_slabs} slabs of {stat.slab_bytes / 1024:g} KiB in use",
        f"disk: {stat.blocks_on_disk} of {stat.disk_slots} slots" if stat.disk_slots else "disk: none",
        f"leases: {stat.leases}; spaces: {len(stat.spaces)}",
    ]
    return "\n".join([*lines, *(f"{name}: {count}" for name, count in sorted(stat.counts.items()))])


async def _stat(args: argparse.Namespace) -> NodeStat:
    client = _client(args, _NO_SPACE)
    await client.start()
    try:
        return await client.stat()
    finally:
        await client.close()


async def _clear(args: argparse.Namespace) -> tuple[int, int]:
    wanted: list[SpaceStat] = [s for s in (await _stat(args)).spaces if args.all or s.namespace == args.only]
    count = 0
    for space in wanted:
        client = _client(args, BlockSpace(bytes.fromhex(space.fingerprint), space.namespace))
        await client.start()
        try:
            count += await client.clear()
        finally:
            await client.close()
    return count, len(wanted)


def _client(args: argparse.Namespace, space: BlockSpace) -> PoolClient:
    return PoolClient(args.node, space, secret=cluster_secret(load_settings(args)), transports=("tcp",))


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
