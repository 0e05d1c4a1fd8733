"""Asking the pool's nodes that instances are configured with, as those instances would. Every wait has an end."""

from __future__ import annotations

import asyncio
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kvferry.doctor.asking import connect
from kvferry.doctor.case import Case
from kvferry.doctor.facts import PoolAnswer, Side
from kvferry.doctor.reach import CONNECT_S, stopped_owner
from kvferry.doctor.secret import secret_of
from kvferry.doctor.settings import Settings, as_int, json_object
from kvferry.errors import AuthenticationError, ConfigError, KVError
from kvferry.pool import BlockSpace, PoolClient

ASK_S = 2.0
_Job = tuple[str, str, bytes | None, int | None]
"""Who is configured with a node, its address, the secret that it would prove, and the bytes of one of its blocks."""


def gather_pool(case: Case) -> tuple[PoolAnswer, ...]:
    """What each configured node of the pool says."""
    jobs: dict[tuple[str, str], _Job] = {}
    for side in case.facts.sides:
        settings = case.settings[side.name]
        if side.process is not None and side.process.netns != case.facts.host.netns:
            continue
        for address in _nodes(settings.flag("pool")):
            jobs[side.name, address] = (side.name, address, _secret(side), block_bytes(side, settings))
    own = case.facts.kvferry
    for address in own.engine.pool if own is not None else ():
        jobs.setdefault(("", address), (str(case.facts.kvferry_path), address, _secret(None, case), None))
    return asyncio.run(_ask_all(list(jobs.values()))) if jobs else ()


def block_bytes(side: Side, settings: Settings) -> int | None:
    """Bytes of one block of one rank, all layers; None where its model's config.json is not on this machine.

    A dtype that is not stated counts as two bytes an element, so that the size is never said to be more than it is.
    """
    if settings.model is None and settings.engine == "kvferry":
        text = resources.files("kvferry").joinpath("models", "demo", "config.json").read_text()
    else:
        try:
            text = (Path(settings.model or "") / "config.json").read_text()
        except (OSError, ValueError):
            return None
    config = json_object(text) or {}
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    size = config.get("head_dim") or _ratio(config.get("hidden_size"), config.get("num_attention_heads"))
    numbers = [as_int(x) for x in (config.get("num_hidden_layers"), heads, size)]
    if None in numbers or "kv_lora_rank" in config:
        return None
    layers, num_heads, head_size = (n or 0 for n in numbers)
    element = 4 if settings.flag("dtype") in ("float32", "float") else 2
    element = 1 if (settings.flag("kv-cache-dtype") or "").startswith("fp8") else element
    block_size = as_int(settings.flag("block-size")) or 16
    return 2 * layers * -(-num_heads // settings.tp) * head_size * element * block_size


def _ratio(a: Any, b: Any) -> int | None:
    first, second = as_int(a), as_int(b)
    return first // second if first and second else None


def _nodes(text: str | None) -> list[str]:
    return [x.strip() for x in (text or "").split(",") if "://" in x]


def _secret(side: Side | None, case: Case | None = None) -> bytes | None:
    try:
        return secret_of(side, case.facts.kvferry if case is not None else None)
    except ConfigError:
        return None


async def _ask_all(jobs: list[_Job]) -> tuple[PoolAnswer, ...]:
    return tuple(await asyncio.gather(*(_ask(*job) for job in jobs)))


async def _ask(side: str, address: str, secret: bytes | None, needed: int | None) -> PoolAnswer:
    answer = PoolAnswer(side, address, "absent", block_bytes=needed)
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port or 0
        await asyncio.to_thread(lambda: connect(host, port, CONNECT_S).close())
    except (OSError, ValueError) as e:
        return msgspec.structs.replace(answer, detail=str(e))
    client = PoolClient(address, BlockSpace(bytes(32)), secret=secret, transports=("tcp",), deadline_s=ASK_S)
    try:
        await client.start()
        stat = await client.stat()
    except AuthenticationError as e:
        return msgspec.structs.replace(answer, outcome="secret", detail=e.message)
    except KVError as e:
        owner = await asyncio.to_thread(stopped_owner, host, port)
        return msgspec.structs.replace(answer, outcome="silent", detail=e.message, stopped_owner=owner)
    finally:
        await client.close()
    return msgspec.structs.replace(answer, outcome="ok", slab_bytes=stat.slab_bytes)
