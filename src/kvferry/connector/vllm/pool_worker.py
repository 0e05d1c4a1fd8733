"""The worker half's side of the pool: loads into this rank's blocks, and saves from them. Pure: no vLLM, no torch.

It lives beside `worker.py` and is called at the same points of a step: `begin_step` before the forward may overwrite
anything, `start_loads` before or after it, `save` after its launch, `finished` and `take_failed_blocks` at the end.

On a GPU, vLLM runs ahead: a forward that it has launched may still write into blocks which it has given to another
request meanwhile. (As a consumer of KV it waits with that itself, as a mere producer, which loads from a pool all the
same, it does not.) So loads begin behind the forwards that were launched before their step, and saves behind their own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from kvferry.connector.vllm.metadata import PoolLoad, PoolSave, StepPlan
from kvferry.connector.vllm.stream import AfterForward

DROP_LIMIT_S = 10.0
"""How long a preempted request's saves may take to stop: they take microseconds, and the forward waits for them."""

_log = logging.getLogger("kvferry.vllm")
T_co = TypeVar("T_co", covariant=True)


class PendingLike(Protocol[T_co]):
    """What is used of `kvferry.pool.pending.Pending`: a value that always comes."""

    def done(self) -> bool: ...
    def result(self, timeout_s: float | None = None) -> T_co: ...
    def cancel(self) -> None: ...


class LoadedLike(Protocol):
    """What is used of `kvferry.pool.Loaded`."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def tiers(self) -> Mapping[str, int]: ...
    @property
    def duration_s(self) -> float: ...
    @property
    def cause(self) -> str | None: ...


class SavedLike(Protocol):
    """What is used of `kvferry.pool.Saved`."""

    @property
    def stored(self) -> int: ...
    @property
    def duplicates(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def cause(self) -> str | None: ...


class PoolLike(Protocol):
    """What is used of `kvferry.pool.PoolAttachment`. Thread-safe; no call blocks."""

    def load(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> PendingLike[LoadedLike]: ...
    def save(
        self, hashes: Sequence[bytes], block_ids: Sequence[int], *, first: int, length: int
    ) -> PendingLike[SavedLike]: ...


@dataclass
class Loading:
    """One request's load. It waits for earlier forwards until it has a `pending`."""

    block_ids: list[int]
    pending: PendingLike[LoadedLike] | None = None


@dataclass
class Saving:
    """One request's saves. `num_queued` wait for the forward that completes their blocks."""

    num_queued: int = 0
    pending: list[PendingLike[SavedLike]] = field(default_factory=list)
    is_dropped: bool = False
    has_ended: bool = False


class PoolWorkerHalf:
    """One rank's loads and saves.

    Args:
        on_loaded: called with the block ids that a load filled, before the request may run.
        count_load, count_saved: told each end, for metrics; on the model runner's thread.
    """

    def __init__(
        self,
        pool: PoolLike,
        *,
        after_forward: AfterForward,
        on_loaded: Callable[[list[int]], None] | None = None,
        count_load: Callable[[LoadedLike, int], None] = lambda loaded, wanted: None,
        count_saved: Callable[[SavedLike], None] = lambda saved: None,
        trace: Callable[[str, str], None] = lambda request_id, what: None,
    ) -> None:
        self._pool = pool
        self._after_forward = after_forward
        self._on_loaded = on_loaded
        self._count_load, self._count_saved = count_load, count_saved
        self._trace = trace
        self._loads: dict[str, Loading] = {}
        self._saves: dict[str, Saving] = {}
        self._failed_blocks: set[int] = set()
        self._begun: StepPlan | None = None
        # Held while a save is begun or dropped, so that none begins after its blocks were given away.
        self._saving = threading.Lock()

    def is_idle(self) -> bool:
        """Whether nothing is loaded or saved."""
        return not self._loads and not self._saves

    def begin_step(self, plan: StepPlan) -> None:
        """Stop the saves of requests that lost their blocks; begin this step's loads behind the forwards before it.

        Must run before the step's forward, in which the blocks have new owners: when this returns, nothing reads them
        any more. A second call for the same plan does nothing.
        """
        if plan is self._begun:
            return
        self._begun = plan
        for request_id in plan.pool_drops:
            self._drop(request_id)
        if plan.pool_loads:
            work = [(load, Loading(load.block_ids)) for load in plan.pool_loads]
            self._loads.update((load.request_id, loading) for load, loading in work)
            self._after_forward.do(lambda: self._begin_loads(work))

    def start_loads(self, plan: StepPlan) -> None:
        """See to it that this step's loads have begun."""
        self.begin_step(plan)

    def save(self, plan: StepPlan) -> None:
        """The step's forward is enqueued: offer the blocks that it completes, once it has."""
        self.begin_step(plan)
        if not plan.pool_saves:
            return
        work = []
        for save in plan.pool_saves:
            saving = self._saves.setdefault(save.request_id, Saving())
            saving.num_queued += 1
            work.append((save, saving))
        self._after_forward.do(lambda: self._begin_saves(work))

    def finished(self, finished_request_ids: Iterable[str]) -> tuple[set[str], set[str]]:
        """(requests whose blocks the saves need no longer, requests whose load has ended); each is named once.

        A request is named among the first only after vLLM said that it finished.
        """
        for request_id in finished_request_ids:
            if (saving := self._saves.get(request_id)) is not None:
                saving.has_ended = True
        return self._take_saved(), self._take_loaded()

    def holds(self, request_id: str) -> bool:
        """Whether this request's blocks may still be read."""
        return request_id in self._saves

    def take_failed_blocks(self) -> set[int]:
        """Blocks that a load left undefined. Never later than the `finished` that names their request."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    # Inside

    def _begin_loads(self, work: list[tuple[PoolLoad, Loading]]) -> None:
        for load, loading in work:
            loading.pending = self._pool.load(load.hashes, load.block_ids)
            self._trace(load.request_id, f"asked the pool for {len(load.hashes)} blocks")

    def _begin_saves(self, work: list[tuple[PoolSave, Saving]]) -> None:
        for save, saving in work:
            with self._saving:
                saving.num_queued -= 1
                if not saving.is_dropped:
                    pending = self._pool.save(
                        save.hashes, save.block_ids, first=save.first_block, length=save.num_blocks
                    )
                    saving.pending.append(pending)

    def _drop(self, request_id: str) -> None:
        saving = self._saves.pop(request_id, None)
        if saving is None:
            return
        with self._saving:
            saving.is_dropped = True
            for pending in saving.pending:
                pending.cancel()
        for pending in saving.pending:
            self._count_saved(pending.result(DROP_LIMIT_S))

    def _take_saved(self) -> set[str]:
        over = set()
        for request_id, saving in self._saves.items():
            with self._saving:
                done = [p for p in saving.pending if p.done()]
                saving.pending = [p for p in saving.pending if p not in done]
                if saving.has_ended and not saving.pending and not saving.num_queued:
                    over.add(request_id)
            for pending in done:
                self._count_saved(pending.result())
        for request_id in over:
            del self._saves[request_id]
        return over

    def _take_loaded(self) -> set[str]:
        over = {r: load.pending for r, load in self._loads.items() if load.pending is not None and load.pending.done()}
        for request_id, pending in over.items():
            load, loaded = self._loads.pop(request_id), pending.result()
            good, rest = load.block_ids[: loaded.num_blocks], load.block_ids[loaded.num_blocks :]
            if rest:
                self._failed_blocks.update(rest)
                _log.warning(
                    "request %s: the pool brought %d of %d blocks (%s); the rest is computed here",
                    request_id, len(good), len(load.block_ids), loaded.cause or "the others have left it",
                )  # fmt: skip
            if good and self._on_loaded is not None:
                self._on_loaded(good)
            self._count_load(loaded, len(load.block_ids))
            self._trace(request_id, f"loaded {len(good)} blocks after {loaded.duration_s * 1e3:.2f} ms")
        return set(over)
