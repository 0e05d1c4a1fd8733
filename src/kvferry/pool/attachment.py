"""An engine's tie to the pool: look up, load and save blocks of its KV memory, without ever waiting for the pool.

A thread of its own runs the connections. Whatever goes wrong is a miss with a cause, and everything ends within the
deadline; a block that is being loaded or saved stays the caller's until the `Pending` is done, and is not touched any
more from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvferry.errors import ConfigError, KVError, PoolExhausted, TransferTimeout, TransportClosed
from kvferry.layout import KVLayout, Offsets
from kvferry.observe import get_log
from kvferry.observe.attachment import PoolStats
from kvferry.pool.client import PoolClient
from kvferry.pool.cluster import PoolNodes
from kvferry.pool.directory import Directory
from kvferry.pool.fetching import fetch_blocks
from kvferry.pool.gpu import gpu_of, open_device
from kvferry.pool.hosts import require_way_back
from kvferry.pool.keys import BlockSpace
from kvferry.pool.messages import Leased
from kvferry.pool.parts import BlockPart, Piece, block_bytes, parts_of, require_inside
from kvferry.pool.pending import Loaded, Pending, Saved, finished
from kvferry.transfer import Peer, TransferEngine, TransferSettings

if TYPE_CHECKING:
    from kvferry.pool.device import DeviceBlocks

PUT_BYTES = 64 << 20
"""The most that one put saves; between two puts, loads go first."""

CLOSE_TIMEOUT_S = 10.0
CANCELLED = "cancelled"
T = TypeVar("T")
_log = get_log(__name__)


class PoolAttachment:
    """One rank's blocks and the pool. Thread-safe; no method but the constructor and `close` waits."""

    def __init__(
        self,
        nodes: Sequence[str],
        space: BlockSpace,
        layout: KVLayout,
        buffers: Mapping[int, Any],
        *,
        secret: bytes | None = None,
        directory: str | None = None,
        transports: tuple[str, ...] = ("shm", "tcp"),
        transfer: TransferSettings | None = None,
        listen: str = "tcp://127.0.0.1:0",
        deadline_s: float = 5.0,
        max_saving_bytes: int = 1 << 30,
        staging_bytes: int = 64 << 20,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            nodes: their `tcp://host:port`; the first takes what is saved, and is best one on this host.
            space: `BlockSpace.of` this rank's fingerprint and layout.
            buffers: the memory of each region that the layout names (numpy or torch, contiguous), all of it host memory
                or all of it one GPU's.
            directory: `redis://host:port/number`, where nodes beyond these tell what they hold.
            listen: where this engine's peers reach it: a first node on another host fetches what is saved from there,
                at a port that the system chooses.
            deadline_s: for each lookup, load and save, its time in the queue included.
            max_saving_bytes: more than that is not queued to be saved; a single save always is.
            staging_bytes: pinned memory through which the blocks of a GPU come and go; four blocks at least.
            wake: called on the attachment's thread whenever something is done.
        Raises: ConfigError, RegistrationError where memory and layout do not fit. No node need be there yet.
        """
        if not nodes:
            raise ConfigError("a pool needs at least one node; name this host's first, such as tcp://127.0.0.1:7400")
        require_way_back(nodes[0], listen)
        gpu = gpu_of(buffers)
        self._deadline_s, self._max_saving_bytes, self._wake = deadline_s, max_saving_bytes, wake
        self._loop = asyncio.new_event_loop()

        # A call to a node ends before the whole does, so that it is known which node was late; and where several are
        # asked before one is read from, one that is stopped leaves time for the others.
        call_s = 0.9 * deadline_s / (1 if len(nodes) == 1 and directory is None else 2)

        def connect(address: str, listen: str = "tcp://127.0.0.1:0") -> PoolClient:
            return PoolClient(
                address,
                space,
                secret=secret,
                transports=transports,
                transfer=transfer,
                deadline_s=call_s,
                listen=listen,
                fetch=self._fetch,
                on_lost=self._on_node_lost,
            )

        self._directory = None if directory is None else _open_directory(directory)
        home = connect(nodes[0], f"{listen.rpartition(':')[0]}:0")
        others = [connect(node) for node in nodes[1:]]
        self._nodes = PoolNodes([home, *others], directory=self._directory, connect=connect)
        self._lock = threading.Lock()
        self._closed = False
        self._saving_bytes = 0
        self._totals: Counter[str] = Counter()
        self._tiers: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._seconds = {"load": 0.0, "save": 0.0}
        self._last_said = ""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loads = 0
        self._no_loads = asyncio.Event()
        self._no_loads.set()
        self._saver = asyncio.Lock()
        self._device: DeviceBlocks | None = None
        try:
            self._parts = self._register(layout, buffers, gpu, staging_bytes)
        except KVError:
            self._loop.run_until_complete(self._shut_down())
            self._loop.close()
            raise
        self.block_bytes = block_bytes(self._parts)
        self._thread = threading.Thread(target=self._run_loop, name="kvferry-pool-attachment", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._nodes.start(), self._loop).result(CLOSE_TIMEOUT_S)

    # From any thread

    def lookup(self, hashes: Sequence[bytes]) -> Pending[int]:
        """How many of these blocks, from the first on, a load would find; 0 where the pool can't be asked."""
        return self._begin(lambda: self._lookup(list(hashes)), lambda cause: 0)

    def prefetch(self, hashes: Sequence[bytes]) -> Pending[int]:
        """Blocks that will be loaded soon: this host's node brings those that it has on disk only into its memory."""
        return self._begin(lambda: self._prefetch(list(hashes)), lambda cause: 0)

    def load(self, hashes: Sequence[bytes], block_ids: Sequence[int] | Offsets) -> Pending[Loaded]:
        """Copy the longest prefix of these blocks that the pool has into the KV blocks with these ids."""
        places = np.array(block_ids, dtype=np.int64)
        return self._begin(lambda: self._load(list(hashes), places), lambda cause: self._not_loaded(len(hashes), cause))

    def save(
        self,
        hashes: Sequence[bytes],
        block_ids: Sequence[int] | Offsets,
        *,
        first: int = 0,
        length: int = 0,
    ) -> Pending[Saved]:
        """Copy the KV blocks with these ids into the pool, those that it has already excepted. Loads go first.

        The blocks stay as they are until the result is there. Refused at once, with nothing copied, where too much is
        waiting to be saved.

        Args:
            first, length: they are blocks `first` onwards of a prompt of `length` blocks.
        """
        nbytes, places = len(hashes) * self.block_bytes, np.array(block_ids, dtype=np.int64)
        with self._lock:
            full = self._saving_bytes > 0 and self._saving_bytes + nbytes > self._max_saving_bytes
            if not full:
                self._saving_bytes += nbytes
        if full:
            cause = PoolExhausted("").cause
            self._count(cause)
            return finished(self._loop, self._not_saved(len(hashes), cause))
        pending = self._begin(
            lambda: self._save(list(hashes), places, first, length),
            lambda cause: self._not_saved(len(hashes), cause),
        )
        pending.on_done(lambda: self._end_saving(nbytes))
        return pending

    def stats(self) -> PoolStats:
        """The figures now."""
        with self._lock:
            return PoolStats(
                **self._totals,
                loaded_blocks=dict(self._tiers),
                load_seconds=self._seconds["load"],
                save_seconds=self._seconds["save"],
                saving_bytes=self._saving_bytes,
                failures=dict(self._failures + self._nodes.failures),
            )

    def close(self) -> None:
        """End what is under way, part from the nodes, join the thread. Nothing is touched afterwards. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # On the attachment's thread

    async def _lookup(self, hashes: list[bytes]) -> int:
        async with asyncio.timeout(self._deadline_s):
            found = await self._nodes.longest_prefix(hashes)
        self._add(lookups=1)
        return found

    async def _prefetch(self, hashes: list[bytes]) -> int:
        async with asyncio.timeout(self._deadline_s):
            return await self._nodes.prefetch(hashes)

    async def _load(self, hashes: list[bytes], places: Offsets) -> Loaded:
        began_s = time.monotonic()
        self._loads += 1
        self._no_loads.clear()
        try:
            async with asyncio.timeout(self._deadline_s):
                got = await self._nodes.get(hashes, self._parts, places)
        finally:
            self._loads -= 1
            if not self._loads:
                self._no_loads.set()
        num_blocks, duration_s = got.num_prefix, time.monotonic() - began_s
        remote = num_blocks if got.node != self._nodes.home.address else 0
        tiers = {"remote": remote, "disk": 0 if remote else got.from_disk}
        tiers["host"] = num_blocks - sum(tiers.values())
        loaded = Loaded(num_blocks, num_blocks * self.block_bytes, tiers, duration_s, got.transport, got.cause)
        with self._lock:
            self._tiers.update(tiers)
            self._seconds["load"] += duration_s
        self._add(loads=1, missed_blocks=len(hashes) - num_blocks, loaded_bytes=loaded.nbytes)
        return loaded

    async def _save(self, hashes: list[bytes], places: Offsets, first: int, length: int) -> Saved:
        began_s = time.monotonic()
        stored = duplicates = 0
        cause: str | None = None
        async with (
            asyncio.timeout(self._deadline_s),
            self._saver,
            contextlib.aclosing(self._outgoing(places)) as pieces,
        ):
            async for piece in pieces:
                await self._no_loads.wait()
                done = await self._nodes.put(
                    hashes[piece.first : piece.stop],
                    piece.parts,
                    piece.places,
                    first=first + piece.first,
                    length=length,
                )
                stored, duplicates, cause = stored + done.stored, duplicates + done.duplicates, done.cause
                if cause is not None:
                    break
        refused = len(hashes) - stored - duplicates
        duration_s = time.monotonic() - began_s
        saved = Saved(stored, duplicates, refused, stored * self.block_bytes, duration_s, cause)
        with self._lock:
            self._seconds["save"] += duration_s
        self._add(
            saves=1, saved_blocks=stored, duplicate_blocks=duplicates, refused_blocks=refused, saved_bytes=saved.nbytes
        )
        return saved

    def _not_loaded(self, num_blocks: int, cause: str) -> Loaded:
        self._add(loads=1, missed_blocks=num_blocks)
        return Loaded(cause=cause)

    def _not_saved(self, num_blocks: int, cause: str) -> Saved:
        self._add(saves=1, refused_blocks=num_blocks)
        return Saved(refused=num_blocks, cause=cause)

    # Inside

    def _register(
        self, layout: KVLayout, buffers: Mapping[int, Any], gpu: int | None, staging_bytes: int
    ) -> tuple[BlockPart, ...]:
        regions = {index: self._nodes.register(buffer) for index, buffer in buffers.items()}
        parts = parts_of(layout, {index: region.region_id for index, region in regions.items()})
        every_block = np.array([0, layout.num_blocks - 1], dtype=np.int64)
        by_id = {region.region_id: region for region in regions.values()}
        require_inside(parts, every_block, by_id)
        if gpu is not None:
            self._device = open_device(gpu, parts, by_id, self._nodes.allocate, staging_bytes)
        return parts

    async def _outgoing(self, places: Offsets) -> AsyncGenerator[Piece, None]:
        """The blocks at these places, as much at a time as one put takes; those of a GPU as copies in host memory."""
        if self._device is None:
            step = max(1, PUT_BYTES // self.block_bytes)
            for first in range(0, len(places), step):
                taken = places[first : first + step]
                yield Piece(first, first + len(taken), self._parts, taken)
            return
        until_s = time.monotonic() + self._deadline_s
        async with contextlib.aclosing(self._device.outgoing(places, until_s)) as pieces:
            async for piece in pieces:
                yield piece

    async def _fetch(self, engine: TransferEngine, peer: Peer, lease: Leased, **where: Any) -> str:
        if self._device is None:
            return await fetch_blocks(engine, peer, lease, **where)
        return await self._device.fetch(engine, peer, lease, **where)

    def _on_node_lost(self, peer: Peer) -> None:
        if self._device is not None:
            self._device.lost(peer)

    def _begin(self, work: Callable[[], Coroutine[Any, Any, T]], failed: Callable[[str], T]) -> Pending[T]:
        pending: Pending[T] = Pending(self._loop)

        def begin() -> None:
            if self._closed:
                pending._finish(failed(TransportClosed("").cause))
                return
            task = self._loop.create_task(work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            pending._follow(task, lambda error: failed(self._cause_of(error)))
            pending.on_done(self._wake)

        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(begin)
                return pending
        return finished(self._loop, failed(TransportClosed("").cause))

    def _cause_of(self, error: BaseException) -> str:
        if isinstance(error, asyncio.CancelledError):
            return TransportClosed("").cause if self._closed else CANCELLED
        if isinstance(error, TimeoutError):
            cause = TransferTimeout("").cause
        elif isinstance(error, KVError):
            cause = error.cause
        else:
            # A bug, but none that a request should die of: it is computed as if there were no pool.
            cause = "internal_error"
            _log.error("the pool's attachment failed; a miss", exc_info=error)
        self._count(cause)
        if isinstance(error, KVError) and error.message != self._last_said:
            self._last_said = error.message
            _log.warning("the pool cannot serve this", cause=cause, error=str(error))
        return cause

    def _add(self, **counts: int) -> None:
        with self._lock:
            self._totals.update(counts)

    def _count(self, cause: str) -> None:
        with self._lock:
            self._failures[cause] += 1

    def _end_saving(self, nbytes: int) -> None:
        with self._lock:
            self._saving_bytes -= nbytes

    async def _shut_down(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._device is not None:
            await self._device.close()
        await self._nodes.close()
        if self._directory is not None:
            await self._directory.close()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


def _open_directory(url: str) -> Directory:
    try:
        from kvferry.pool.directory_redis import RedisDirectory
    except ModuleNotFoundError as error:
        raise ConfigError(f"the pool's directory needs {error.name}; do: pip install 'kvferry[redis]'") from error
    return RedisDirectory(url)
