"""Processes of a pool for its tests: `kvferry node`, a real Redis, and what clients of theirs put and get."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from kvferry.observe import LISTENING
from kvferry.pool import BlockSpace, PoolClient
from kvferry.pool.client import GetResult, PutResult
from kvferry.pool.parts import whole

BLOCK = 65536
WAIT_S = 60.0
"""How long a test waits for what must come: a process may get no CPU for seconds."""
SPACE = BlockSpace(b"m" * 32, "tenant-a")


def fixed_port() -> int:
    """A free port for one who listens there again and again: below those that outgoing connections are given."""
    while True:
        port = random.randrange(10000, 20000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class NodeProcess:
    """`kvferry node`: ended by SIGTERM on leaving, unless it was killed before."""

    def __init__(self, *flags: str, stderr: IO[str] | None = None) -> None:
        command = [sys.executable, "-m", "kvferry", "node", "--slab-bytes", "64KiB", "--log-level", "warning", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith(LISTENING):
            self.kill()
            self.process.stdout.close()
            raise AssertionError(f"the node did not start: {line!r}; look at its standard error")
        self.address = line.removeprefix(LISTENING).strip()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdout is not None
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                assert self.process.wait(WAIT_S) == 0 or kind is not None
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


class RedisServer:
    """A real server on a port of its own, with nothing saved."""

    def __init__(self, directory: Path) -> None:
        self.port = fixed_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._flags = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it serves."""
        server = shutil.which("redis-server")
        assert server is not None
        self.process = subprocess.Popen([server, *self._flags], stdout=subprocess.DEVNULL)
        give_up_s = time.monotonic() + WAIT_S
        while time.monotonic() < give_up_s:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), WAIT_S):
                return
            assert self.process.poll() is None
            time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def kill(self) -> None:
        """kill -9: all that it held is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def stop(process: subprocess.Popen[str]) -> None:
    """SIGSTOP; returns when the process stands."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[RedisServer]:
    """A server that runs, and ends with this."""
    server = RedisServer(directory)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.asynccontextmanager
async def client_of(address: str, space: BlockSpace = SPACE, **more: object):  # type: ignore[no-untyped-def]
    """A client of a node, over TCP, as one of another host."""
    client = PoolClient(address, space, **{"transports": ("tcp",), "deadline_s": WAIT_S, **more})  # type: ignore[arg-type]
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def content(number: int, space: BlockSpace = SPACE) -> np.ndarray:
    """uint8 [BLOCK]: a block's own bytes, other ones for each tenant."""
    return np.random.default_rng([number, *space.namespace.encode()]).integers(0, 256, BLOCK, dtype=np.uint8)


def name(number: int) -> bytes:
    return number.to_bytes(8, "big")


async def put(client: PoolClient, numbers: Sequence[int]) -> PutResult:
    """Put these blocks as one prompt."""
    region = client.allocate(len(numbers) * BLOCK)
    for row, number in zip(region.buffer.reshape(-1, BLOCK), numbers, strict=True):
        row[:] = content(number, client.space)
    places = np.arange(len(numbers)) * BLOCK
    return await client.put([name(n) for n in numbers], whole(region, BLOCK), places, length=len(numbers))


async def get(client: PoolClient, numbers: Sequence[int], *, prefix: bool = False) -> GetResult:
    """Get these blocks; each found one must be the right one, byte by byte."""
    region = client.allocate(len(numbers) * BLOCK)
    places = np.arange(len(numbers)) * BLOCK
    result = await client.get([name(n) for n in numbers], whole(region, BLOCK), places, prefix=prefix)
    for row, number, found in zip(region.buffer.reshape(-1, BLOCK), numbers, result.found, strict=True):
        assert not found or (row == content(number, client.space)).all(), f"block {number} has another's bytes"
    return result


async def eventually(check: Callable[[], Awaitable[bool]], within_s: float = WAIT_S) -> None:
    """Wait until it holds."""
    give_up_s = time.monotonic() + within_s
    while not await check():
        assert time.monotonic() < give_up_s, f"it did not come to pass within {within_s} s"
        await asyncio.sleep(0.02)
