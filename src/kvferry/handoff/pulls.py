"""The target's reads: blocks of published runs, pulled over the transfer engine into the handoff's own blocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.errors import KVError, PeerGone, TransferTimeout, TransferUnfinished
from kvferry.handoff.channels import Channels
from kvferry.handoff.loop import NodeLoop
from kvferry.handoff.memory import KVMemory
from kvferry.handoff.reading import check_digests, hellos, plan_pull
from kvferry.layout import KVLayout
from kvferry.protocol.events import ReadCompleted, ReadFailed, StartRead
from kvferry.transfer import TransferEngine
from kvferry.types import HandoffId, Incarnation

READ_PRIORITY = 10
UNFINISHED_POLL_S = 0.05
_log = logging.getLogger("kvferry.handoff")


class Target(NamedTuple):
    """Own blocks for the prompt's blocks `first_block` onwards, and the source that they come from."""

    source: Incarnation
    first_block: int
    block_ids: npt.NDArray[np.int64]


Read = tuple[int, str | None]
"""Bytes that were pulled, and over which transport."""


class Pulls:
    """Reads under way, by handoff. `report` gets exactly one event for each. All calls belong to the loop.

    Args:
        targets: what `drop_select` was given, while the handoff has not ended.
    """

    def __init__(
        self,
        engine: TransferEngine,
        channels: Channels,
        memory: KVMemory,
        loop: NodeLoop,
        targets: Mapping[HandoffId, Target],
        report: Callable[[ReadCompleted | ReadFailed], None],
    ) -> None:
        self._engine, self._channels, self._memory, self._loop = engine, channels, memory, loop
        self._targets, self._report = targets, report
        self._reads: dict[HandoffId, set[asyncio.Task[Read]]] = {}

    def start(self, wanted: StartRead, layout: KVLayout) -> None:
        reads = self._reads.setdefault(wanted.handoff, set())
        task = self._loop.spawn(self._read(wanted, layout))
        reads.add(task)

        def ended(task: asyncio.Task[Read]) -> None:
            reads.discard(task)
            if not reads:
                self._reads.pop(wanted.handoff, None)
            self._report(_how_it_ended(wanted, task))

        task.add_done_callback(ended)

    def stop(self, handoff: HandoffId) -> None:
        """Cancel the handoff's reads; each is reported once nothing can land any more."""
        for task in list(self._reads.get(handoff, ())):
            task.cancel()

    async def _read(self, wanted: StartRead, layout: KVLayout) -> Read:
        target = self._targets.get(wanted.handoff)
        if target is None:
            raise TransferTimeout("the handoff ended before its read began")
        peer = self._channels.find(target.source)
        if peer is None:
            raise PeerGone("no channel to the source is open", stage="pulling")
        plan = plan_pull(
            wanted, hellos.decode(peer.hello), peer.regions, self._memory.regions, layout,
            target.first_block, target.block_ids,
        )  # fmt: skip
        if not plan.blocks:
            return 0, None
        try:
            done = await self._engine.read(
                peer,
                plan.blocks,
                guard=plan.guard,
                deadline_s=wanted.deadline_s,
                priority=READ_PRIORITY,
                summing=plan.kind == "sum" and plan.heads is None,
            )
        except TransferUnfinished as error:
            _log.error("handoff %s keeps its blocks aside: %s", wanted.handoff, error)
            await self._until_over(error)
            raise
        if plan.digests:
            await asyncio.to_thread(check_digests, plan, self._memory, layout, done.sums)
        return done.nbytes, done.transport

    async def _until_over(self, read: TransferUnfinished) -> None:
        """Until nothing can land any more (R7), also when cancelled: till then the read counts as under way."""
        while not self._loop.closing and not read.is_over():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(UNFINISHED_POLL_S)


def _how_it_ended(wanted: StartRead, task: asyncio.Task[Read]) -> ReadCompleted | ReadFailed:
    if task.cancelled():
        return ReadFailed(wanted.handoff, wanted.read_id, "handoff_aborted")
    error = task.exception()
    if error is None:
        nbytes, transport = task.result()
        return ReadCompleted(wanted.handoff, wanted.read_id, nbytes, transport)
    if isinstance(error, KVError):
        return ReadFailed(wanted.handoff, wanted.read_id, error.cause, error.message)
    _log.error("a read of handoff %s ended in a bug", wanted.handoff, exc_info=error)
    return ReadFailed(
        wanted.handoff, wanted.read_id, "internal_error", f"a bug, its traceback is in this instance's log: {error!r}"
    )
