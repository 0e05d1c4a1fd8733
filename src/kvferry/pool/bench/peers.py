"""Other stores, and fio for the disk. Each names why it can't run where it is not installed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvferry.pool.bench import processes
from kvferry.pool.bench.cases import Case, Result, Scale
from kvferry.pool.bench.stores import Store, StoreSystem, System, memories

HOST = "127.0.0.1"
DISK_DEPTH = 8
"""What a node reads for one get, and writes, at once."""


def _missing(module: str, hint: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed ({hint})"


# Redis ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def redis_server() -> Iterator[int]:
    """A server without persistence; gives its port."""
    port = processes.free_port()
    with processes.running(
        ["redis-server", "--port", str(port), "--bind", HOST, "--save", "", "--loglevel", "warning"]
    ):
        processes.await_port(port)
        yield port


class _RedisStore(Store):
    def __init__(self, port: int, memory_bytes: int) -> None:
        import redis

        self.source, self.target = memories(memory_bytes)
        self._redis: Any = redis.Redis(host=HOST, port=port)

    def put(self, keys: list[bytes], sources: list[int], nbytes: int, batch: int) -> None:
        view = memoryview(self.source.data)
        for first in range(0, len(keys), batch):
            pipeline = self._redis.pipeline(transaction=False)
            for key, at in zip(keys[first : first + batch], sources[first : first + batch], strict=True):
                pipeline.set(key, view[at : at + nbytes])
            if not all(pipeline.execute()):
                raise RuntimeError("redis did not take every block")

    def get(self, keys: list[bytes], targets: list[int], nbytes: int, batch: int) -> None:
        address = self.target.ctypes.data
        for first in range(0, len(keys), batch):
            values = self._redis.mget(keys[first : first + batch])
            for value, at in zip(values, targets[first : first + batch], strict=True):
                if value is None or len(value) != nbytes:
                    raise RuntimeError("redis did not have every block")
                ctypes.memmove(address + at, value, nbytes)

    def lookup(self, keys: list[bytes]) -> Callable[[], Sequence[object]]:
        def ask() -> Sequence[object]:
            pipeline = self._redis.pipeline(transaction=False)
            for key in keys:
                pipeline.exists(key)
            answers: list[int] = pipeline.execute()
            return answers

        return ask

    def forget(self, keys: list[bytes]) -> None:
        self._redis.flushall()

    def close(self) -> None:
        self._redis.close()


class Redis(StoreSystem):
    """redis-server over TCP, redis-py with hiredis."""

    name = "redis"

    @classmethod
    def why_not(cls) -> str | None:
        if shutil.which("redis-server") is None:
            return "redis-server is not installed (Debian: redis-server)"
        return _missing("redis", "pip install 'kvferry[redis]'")

    @contextlib.contextmanager
    def open(self, memory_bytes: int, block_bytes: int) -> Iterator[Store]:
        with redis_server() as port:
            store = _RedisStore(port, memory_bytes)
            try:
                yield store
            finally:
                store.close()


# Mooncake Store ------------------------------------------------------------------------------------------------------


def _mooncake_client(master: str, segment_bytes: int, buffer_bytes: int) -> Any:
    os.environ |= {"MC_FORCE_TCP": "1", "MC_TCP_BIND_ADDRESS": HOST, "MC_LOG_LEVEL": "ERROR"}
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    if store.setup(f"{HOST}:{processes.free_port()}", "P2PHANDSHAKE", segment_bytes, buffer_bytes, "tcp", "", master):
        raise RuntimeError("mooncake's store did not set up")
    return store


class _MooncakeStore(Store):
    def __init__(self, master: str, memory_bytes: int) -> None:
        self.source, self.target = memories(memory_bytes)
        self._store = _mooncake_client(master, 0, 16 << 20)
        for memory in (self.source, self.target):
            if self._store.register_buffer(memory.ctypes.data, memory.nbytes):
                raise RuntimeError("mooncake did not register the memory")

    def put(self, keys: list[bytes], sources: list[int], nbytes: int, batch: int) -> None:
        names, address = [key.hex() for key in keys], self.source.ctypes.data
        if batch == 1:
            codes = [self._store.put_from(name, address + at, nbytes) for name, at in zip(names, sources, strict=True)]
        else:
            codes = self._batches(self._store.batch_put_from, names, [address + at for at in sources], nbytes, batch)
        if any(codes):
            raise RuntimeError(f"mooncake did not take every block: {next(filter(None, codes))}")

    def get(self, keys: list[bytes], targets: list[int], nbytes: int, batch: int) -> None:
        names, address = [key.hex() for key in keys], self.target.ctypes.data
        if batch == 1:
            sizes = [self._store.get_into(name, address + at, nbytes) for name, at in zip(names, targets, strict=True)]
        else:
            sizes = self._batches(self._store.batch_get_into, names, [address + at for at in targets], nbytes, batch)
        if any(size != nbytes for size in sizes):
            raise RuntimeError("mooncake did not have every block")

    def lookup(self, keys: list[bytes]) -> Callable[[], Sequence[object]]:
        names = [key.hex() for key in keys]
        return lambda: self._store.batch_is_exist(names)

    def forget(self, keys: list[bytes]) -> None:
        self._store.remove_all(True)

    def close(self) -> None:
        self._store.close()

    def _batches(self, call: Any, names: list[str], places: list[int], nbytes: int, batch: int) -> list[int]:
        codes: list[int] = []
        for first in range(0, len(names), batch):
            some = names[first : first + batch]
            codes += call(some, places[first : first + batch], [nbytes] * len(some))
        return codes


class Mooncake(StoreSystem):
    """Mooncake Store over TCP: its master, a process whose memory is the store, and this one."""

    name = "mooncake"

    @classmethod
    def why_not(cls) -> str | None:
        return _missing("mooncake", "make bench-peers installs it")

    @contextlib.contextmanager
    def open(self, memory_bytes: int, block_bytes: int) -> Iterator[Store]:
        program = Path(importlib.import_module("mooncake").__path__[0]) / "mooncake_master"
        ports = processes.free_port(), processes.free_port()
        command = [str(program), f"--rpc_port={ports[0]}", f"--metrics_port={ports[1]}", "--rpc_address=127.0.0.1"]
        # Room for twice the blocks: its eviction, which begins before the room is full, is not what is measured.
        given = json.dumps({"master": f"{HOST}:{ports[0]}", "bytes": 2 * memory_bytes + (64 << 20), "path": sys.path})
        segment = [sys.executable, "-m", "kvferry.pool.bench.peers", given]
        with processes.running(command):
            processes.await_port(ports[0])
            with processes.running(segment) as process:
                processes.first_line(process)
                store = _MooncakeStore(f"{HOST}:{ports[0]}", memory_bytes)
                try:
                    yield store
                finally:
                    store.close()


def lend_segment(given: dict[str, Any]) -> None:
    """The process whose memory Mooncake's store is, until it is ended."""
    sys.path[:] = given["path"]
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _store = _mooncake_client(given["master"], given["bytes"], 16 << 20)
    told.write("serving\n")
    told.flush()
    signal.pause()


# fio -----------------------------------------------------------------------------------------------------------------


class Fio(System):
    """Direct I/O on preallocated files: as many threads, blocks of the same size."""

    name = "fio"
    kinds = frozenset({"disk-write", "disk-read"})

    @classmethod
    def why_not(cls) -> str | None:
        return None if shutil.which("fio") else "fio is not installed (Debian: fio)"

    def measure(self, cases: list[Case], scale: Scale) -> Iterator[Result]:
        kinds = {case.kind: case for case in cases}
        with tempfile.TemporaryDirectory(dir=scale.disk_path, prefix="kvferry-bench-") as directory:
            for kind, way in (("disk-write", "write"), ("disk-read", "read")):
                seconds = _fio(way, directory, cases[0].block_bytes, scale.disk_bytes)
                if kind in kinds:
                    yield Result(kinds[kind].name, [seconds], scale.disk_bytes, None)


def _fio(way: str, directory: str, block_bytes: int, total_bytes: int) -> float:
    command = ["fio", "--name=blocks", f"--directory={directory}", f"--rw={way}", f"--bs={block_bytes}", "--direct=1"]
    command += ["--ioengine=psync", "--thread", f"--numjobs={DISK_DEPTH}", f"--size={total_bytes // DISK_DEPTH}"]
    command += ["--fallocate=posix", "--group_reporting", "--output-format=json"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # What it says of the files that it lays out comes before the JSON.
    figures = json.loads(told[told.index("{") :])["jobs"][0][way]
    return total_bytes / (1024 * float(figures["bw"]))


if __name__ == "__main__":
    lend_segment(json.loads(sys.argv[1]))
