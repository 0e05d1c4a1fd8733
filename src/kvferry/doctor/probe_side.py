"""One side of the rendezvous probe: a process with a transfer engine, led by JSON lines on its standard input.

Started by `kvferry.doctor.rendezvous`, once for each side, inside that side's network namespace where it has its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from typing import Any

import msgspec
import numpy as np

from kvferry.errors import AuthenticationError, CompatibilityError, KVError, TransferTimeout, WireError
from kvferry.transfer import TransferEngine
from kvferry.transfer.peer import Peer
from kvferry.transport.base import BlockList, Region
from kvferry.wire import Codec, TensorMeta

ANSWER_S = 5.0
PORT_S = 1.0
_codec: Codec[Any] = Codec()


class Prober:
    """The engine of one side and what it was told to do."""

    def __init__(self) -> None:
        self._engine: TransferEngine | None = None
        self._peer: Peer | None = None
        self._regions: list[Region] = []
        self._echo: asyncio.Future[Any] | None = None

    async def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Obey one command; the answer has `ok`, and on failure the step's name and a detail."""
        action = command.pop("do")
        try:
            answer = await getattr(self, f"do_{action}")(**command)
        except (AuthenticationError, CompatibilityError, WireError) as e:
            return {"ok": False, "step": "handshake", "detail": e.message}
        except KVError as e:
            return {"ok": False, "detail": e.message}
        return {"ok": True, **(answer or {})}

    async def do_bind(self, listen: str, transport: str, secret: str | None) -> dict[str, Any]:
        self._engine = TransferEngine(
            listen=listen, transports=(transport,), secret=bytes.fromhex(secret) if secret else None
        )
        self._engine.on_message = self._on_message
        await self._engine.start()
        return {"address": self._engine.address}

    async def do_fill(self, nbytes: int, seed: int) -> dict[str, Any]:
        region = self._own.allocate(nbytes, name="doctor")
        region.buffer[:] = _random(nbytes, seed)
        self._regions.append(region)
        return {"region": region.region_id}

    async def do_connect(self, address: str, deadline_s: float) -> dict[str, Any]:
        try:
            self._peer = await self._own.connect(address, deadline_s=deadline_s)
        except TransferTimeout as e:
            if not await _takes_connections(address):
                raise
            why = "its port takes connections, and what follows does not come through: is the process stopped, is it "
            why += "another server, is the path's MTU smaller than both ends believe?"
            return {"ok": False, "step": "handshake", "detail": f"{e.message}; {why}"}
        ways = self._own.explain(self._peer)
        return {"ways": [{"scheme": w.scheme, "usable": w.usable, "why": w.why} for w in ways]}

    async def do_read(self, region: int, nbytes: int, block_bytes: int, seed: int, deadline_s: float) -> dict[str, Any]:
        target = self._own.allocate(nbytes, name="doctor")
        self._regions.append(target)
        order = np.random.default_rng(seed + 1).permutation(nbytes // block_bytes) * block_bytes
        straight = np.arange(nbytes // block_bytes, dtype=np.int64) * block_bytes
        blocks = BlockList(self._remote.regions[region], target, order.astype(np.int64), straight, block_bytes)
        # The first read touches fresh memory; the second is the one that is measured.
        try:
            for _ in range(2):
                done = await self._own.read(self._remote, blocks, deadline_s=deadline_s)
        except KVError as e:
            right = nbytes // block_bytes - len(_wrong_blocks(target, order, nbytes, block_bytes, seed))
            return {"ok": False, "detail": e.message, "right_blocks": right}
        wrong = _wrong_blocks(target, order, nbytes, block_bytes, seed)
        return {
            "wrong_blocks": len(wrong),
            "first_wrong": int(wrong[0]) if len(wrong) else None,
            "duration_s": done.duration_s,
            "transport": done.transport,
        }

    async def do_nested(self) -> dict[str, Any]:
        value = nested_metadata()
        self._echo = asyncio.get_running_loop().create_future()
        self._remote.send(_codec.encode(["ask", value]))
        try:
            async with asyncio.timeout(ANSWER_S):
                echoed = await self._echo
        except TimeoutError:
            return {"same": False, "why": f"no echo within {ANSWER_S:.0f} s"}
        return {"same": same(value, echoed), "why": "the echo differs from what was sent"}

    async def do_close(self) -> dict[str, Any]:
        if self._engine is not None:
            await self._engine.close()
        self._engine, self._peer = None, None
        self._regions.clear()
        return {}

    @property
    def _own(self) -> TransferEngine:
        assert self._engine is not None, "bind comes first"
        return self._engine

    @property
    def _remote(self) -> Peer:
        assert self._peer is not None, "connect comes first"
        return self._peer

    def _on_message(self, peer: Peer, payload: bytes) -> None:
        try:
            kind, value = _codec.decode(payload)
        except (WireError, ValueError, TypeError) as e:
            kind, value = "echo", {"error": str(e)}
        if kind == "ask":
            peer.send(_codec.encode(["echo", value]))
        elif self._echo is not None and not self._echo.done():
            self._echo.set_result(value)


async def _takes_connections(address: str) -> bool:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        async with asyncio.timeout(PORT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError, ValueError):
        return False
    writer.close()
    return True


def nested_metadata() -> dict[str, Any]:
    """A value with everything that handoff metadata may hold, several levels deep."""
    table = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    return {
        "request": "probe-你好-😀",
        "layers": [
            {"layer": i, "block_ids": table[i], "digest": bytes(range(32)), "meta": _plain(TensorMeta.of(table[i]))}
            for i in range(2)
        ],
        "nothing": None,
        "deep": {"list": [[[]], [[1, -1, 2**62]], {"x": 0.5}], "flags": [True, False]},
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, arrays included; tuples and lists count as one."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        arrays = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
        return arrays and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def _wrong_blocks(target: Region, order: Any, nbytes: int, block_bytes: int, seed: int) -> Any:
    """Which blocks are not those that were filled in on the other side, in the order that they were read in."""
    expected = _random(nbytes, seed).reshape(-1, block_bytes)[order // block_bytes]
    return np.flatnonzero((target.buffer.reshape(-1, block_bytes) != expected).any(axis=1))


def _plain(meta: TensorMeta) -> Any:
    return msgspec.to_builtins(meta)


def _random(nbytes: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(np.random.default_rng(seed).bytes(nbytes), dtype=np.uint8)


async def _obey() -> None:
    prober = Prober()
    loop = asyncio.get_running_loop()
    try:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            answer = await prober.do(msgspec.json.decode(line))
            sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
            sys.stdout.flush()
    finally:
        await prober.do_close()


def _end_with_parent() -> None:
    """End this process if it outlives any probe by far."""
    time.sleep(120)
    with contextlib.suppress(OSError):
        sys.stderr.write("the probe took longer than 120 s\n")
    import os

    os._exit(3)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(_obey())
