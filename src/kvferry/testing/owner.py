"""A process that owns memory, for tests: an engine of its own, driven by lines of JSON.

`OwnerProcess` starts it, asks it to register memory, to change words and bytes, and can kill, stop and continue it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO, Any

import numpy as np
import xxhash

from kvferry.errors import KVError
from kvferry.transfer import TransferEngine, TransferSettings
from kvferry.transport.base import Region
from kvferry.transport.memory import WordTable


class Owner:
    """The commands that the process understands; each public method is one."""

    def __init__(self, engine: TransferEngine) -> None:
        self.engine = engine
        self._regions: dict[int, Region] = {}
        self._words: dict[int, WordTable] = {}
        self._churning: threading.Thread | None = None
        self._stop = threading.Event()

    def region(self, nbytes: int, *, seed: int | None = None, shared: bool = True, writable: bool = False) -> int:
        """Register memory, filled with random bytes from `seed` (zeros without one)."""
        buffer = None if shared else np.zeros(nbytes, dtype=np.uint8)
        made = self.engine.allocate(nbytes, writable=writable) if shared else None
        region = made or self.engine.register(buffer, writable=writable)
        if seed is not None:
            region.buffer[:] = random_bytes(nbytes, seed)
        self._regions[region.region_id] = region
        return region.region_id

    def unregister(self, region_id: int) -> None:
        self.engine.unregister(self._regions.pop(region_id))

    def digest(self, region_id: int) -> str:
        """xxh3-128 of all bytes of a region."""
        return xxhash.xxh3_128_hexdigest(self._regions[region_id].buffer)

    def word(self, region_id: int, offset: int, word: int) -> None:
        """Store a word."""
        table = self._words.setdefault(region_id, WordTable(self._regions[region_id]))
        table.store(offset, word)

    def churn(self, region_id: int, words_id: int, offset: int, block_bytes: int, stands_s: float) -> None:
        """From now on reuse the blocks again and again, as a busy cache does: store 0, overwrite every block with
        bytes of the next word, store that word and leave it for `stands_s`."""
        region, table = self._regions[region_id], WordTable(self._regions[words_id])
        blocks = (
            region.buffer[: region.nbytes // block_bytes * block_bytes].view(np.int64).reshape(-1, block_bytes // 8)
        )

        def run() -> None:
            rng = np.random.default_rng(1)
            while not self._stop.is_set():
                word = int(rng.integers(1, 2**62))
                table.zero(offset)
                blocks[:] = word
                table.store(offset, word)
                # Long enough to be read now and then, short enough to be caught in the act often.
                self._stop.wait(stands_s)

        self._churning = threading.Thread(target=run, daemon=True)
        self._churning.start()

    def calm(self) -> None:
        """End `churn`."""
        self._stop.set()
        if self._churning is not None:
            self._churning.join()

    def peers(self) -> int:
        """How many peers are connected."""
        return len(self.engine.peers)


@functools.lru_cache(maxsize=2)
def random_bytes(nbytes: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """uint8 [nbytes], read-only, the same for the same seed in every process. Two are kept, as drawing them is slow."""
    return np.frombuffer(np.random.default_rng(seed).bytes(nbytes), dtype=np.uint8)


class OwnerProcess:
    """An `Owner` in a process of its own, as the tests see it."""

    def __init__(
        self,
        transports: tuple[str, ...],
        *,
        listen: str = "tcp://127.0.0.1:0",
        secret: str = "conformance",
        verify_digest: bool = False,
        plugin: str = "",
        prefix: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            plugin: a module that registers third-party transports, imported by the process first.
            prefix: a command that starts the process, such as `ip netns exec NAME`.
        """
        settings = json.dumps([list(transports), listen, secret, verify_digest, plugin])
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "kvferry.testing.owner", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._closed = False
        self.address = str(self._answer())

    def call(self, command: str, *args: Any, **kwargs: Any) -> Any:
        """Run one of Owner's methods there. Raises: RuntimeError with what it raised."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, args, kwargs]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the owner process ended with {self.process.wait()}")
        value, error = json.loads(line)
        if error is not None:
            raise RuntimeError(error)
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGSTOP; returns when every thread stands: until then one of them may still serve a read."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process in good order; kill it if it does not end. Idempotent."""
        if self._closed:
            return
        self._closed = True
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.process.poll() is None:
            self.resume()
            self.process.stdin.close()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        if not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        self.process.stdout.close()


async def _serve(
    told: IO[str], transports: list[str], listen: str, secret: str, verify_digest: bool, plugin: str
) -> None:
    def tell(value: Any, error: str | None) -> None:
        told.write(json.dumps([value, error]) + "\n")
        told.flush()

    if plugin:
        importlib.import_module(plugin)
    engine = TransferEngine(
        listen=listen,
        transports=tuple(transports),
        secret=secret.encode() or None,
        settings=TransferSettings(verify_digest=verify_digest),
    )
    await engine.start()
    owner = Owner(engine)
    tell(engine.address, None)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command, args, kwargs = json.loads(line)
        try:
            tell(await loop.run_in_executor(None, lambda: getattr(owner, command)(*args, **kwargs)), None)  # noqa: B023
        except (KVError, KeyError, TypeError, AttributeError) as error:
            tell(None, f"{type(error).__name__}: {error}")
    owner.calm()
    await engine.close()


if __name__ == "__main__":
    if os.environ.get("KVFERRY_UVLOOP"):
        import uvloop

        uvloop.install()
    # Libraries log to standard output (UCX does): answers go through a copy of it, and what they say to standard error.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        asyncio.run(_serve(answers, *json.loads(sys.argv[1])))
