"""LMCache's local CPU backend: a store inside of this process, and so without what it costs to share one."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvferry.pool.bench.stores import Store, StoreSystem, memories

_MODULES = ("v1.config", "v1.storage_backend.local_cpu_backend", "v1.memory_allocators.mixed_memory_allocator")


class _LMCacheStore(Store):
    def __init__(self, memory_bytes: int) -> None:
        torch = importlib.import_module("torch")
        # More are slower by orders of magnitude where others want the cores, and memory is the bound anyway.
        torch.set_num_threads(1)
        config, backend, allocators = (importlib.import_module(f"lmcache.{name}") for name in _MODULES)
        self._key_type: Any = importlib.import_module("lmcache.utils").CacheEngineKey
        self._format: Any = importlib.import_module("lmcache.v1.memory_management").MemoryFormat.KV_2LTD
        self._size: Any = torch.Size
        self._uint8: Any = torch.uint8
        self.source, self.target = memories(memory_bytes)
        self._memories = torch.from_numpy(self.source), torch.from_numpy(self.target)
        self._backend: Any = backend.LocalCPUBackend(
            config.LMCacheEngineConfig.from_defaults(),
            memory_allocator=allocators.MixedMemoryAllocator(memory_bytes),
            dst_device="cpu",
        )

    def put(self, keys: list[bytes], sources: list[int], nbytes: int, batch: int) -> None:
        for key, at in zip(keys, sources, strict=True):
            block = self._backend.allocate(self._size([nbytes]), self._uint8, self._format)
            block.tensor.copy_(self._memories[0][at : at + nbytes])
            self._backend.submit_put_task(self._key(key), block)
            block.ref_count_down()

    def get(self, keys: list[bytes], targets: list[int], nbytes: int, batch: int) -> None:
        for key, at in zip(keys, targets, strict=True):
            block = self._backend.get_blocking(self._key(key))
            if block is None:
                raise RuntimeError("lmcache did not have every block")
            self._memories[1][at : at + nbytes].copy_(block.tensor)
            block.ref_count_down()

    def lookup(self, keys: list[bytes]) -> Callable[[], Sequence[object]]:
        names = [self._key(key) for key in keys]
        return lambda: [self._backend.contains(name) for name in names]

    def forget(self, keys: list[bytes]) -> None:
        for key in keys:
            self._backend.remove(self._key(key))

    def close(self) -> None:
        self._backend.close()

    def _key(self, key: bytes) -> Any:
        return self._key_type("bench", 1, 0, int.from_bytes(key[-8:], "big"), self._uint8)


class LMCache(StoreSystem):
    """Within one process; torch copies."""

    name = "lmcache"

    @classmethod
    def why_not(cls) -> str | None:
        if importlib.util.find_spec("lmcache") is None or importlib.util.find_spec("torch") is None:
            return "lmcache or torch is not installed (make bench-peers installs lmcache)"
        try:
            for name in _MODULES:
                importlib.import_module(f"lmcache.{name}")
        except (ImportError, AttributeError) as error:
            return f"lmcache can't be imported here: {error}"
        return None

    @contextlib.contextmanager
    def open(self, memory_bytes: int, block_bytes: int) -> Iterator[Store]:
        store = _LMCacheStore(memory_bytes)
        try:
            yield store
        finally:
            store.close()
