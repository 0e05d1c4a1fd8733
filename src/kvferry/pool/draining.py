"""Taking a node out of service: no more puts, hot blocks to other nodes, then out of the directory.

Blocks are copied, never moved: whatever is killed in the middle of it, nothing is lost that the node has. Once it has
left the directory it serves nothing any more, as no removal would reach it.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from kvferry.errors import KVError
from kvferry.observe import get_log, start_background
from kvferry.policy.replication import BlockHeat, leave_first
from kvferry.pool.entries import Entry
from kvferry.pool.index import BlockIndex
from kvferry.pool.neighbours import Cluster
from kvferry.pool.replicas import Replicas, assign

STEP_BLOCKS = 512
_log = get_log(__name__)


class Progress(NamedTuple):
    """`hot` blocks were to be copied: `copied` of them are, `left` could not be. `ended` says that no more will be
    done, and why; empty while it goes on."""

    hot: int = 0
    copied: int = 0
    left: int = 0
    ended: str = ""


class Drain:
    """One node's draining; it can't be taken back but by a restart. On the node's event loop."""

    def __init__(self, index: BlockIndex, replicas: Replicas, cluster: Cluster) -> None:
        self._index, self._replicas, self._cluster = index, replicas, cluster
        self._task: asyncio.Task[None] | None = None
        self.progress = Progress()

    @property
    def begun(self) -> bool:
        """No puts any more."""
        return self._task is not None

    @property
    def has_left(self) -> bool:
        """Nothing is served any more."""
        return bool(self.progress.ended)

    def begin(self, deadline_s: float) -> Progress:
        """Drain, for no longer than `deadline_s`; goes on by itself. Only the first call has an effect."""
        if self._task is None:
            self._replicas.closed_to_more = True
            self._task = start_background(self._run(deadline_s), what="draining the node")
        return self.progress

    async def close(self) -> None:
        """Stop it where it is. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, deadline_s: float) -> None:
        why = "a bug; the node's log has its traceback"
        try:
            async with asyncio.timeout(deadline_s):
                await self._replicas.close()
                await self._copy_hot()
            why = ""
        except TimeoutError:
            why = f"the deadline of {deadline_s:g} s passed"
        except KVError as error:
            why = f"{error.cause}: {error.message}"
        except asyncio.CancelledError:
            why = "the node was closed"
            raise
        finally:
            # Whatever ended it: who waits for it is told, and the node does not stay in the directory.
            await self._cluster.reporter.close()
            left = self.progress.hot - self.progress.copied
            why = why or ("no other node takes more" if left else "all copied")
            self.progress = self.progress._replace(left=left, ended=why)
        _log.info("drained", hot=self.progress.hot, copied=self.progress.copied, why=why)

    async def _copy_hot(self) -> None:
        entries = [entry for entry in self._index.all_in_host() if entry.reuses]
        described = await self._replicas.describe([(entry, float(entry.reuses)) for entry in entries])
        leaving = leave_first(described)
        elsewhere = len(described) - len(leaving)
        self.progress = Progress(hot=len(described), copied=elsewhere)
        full: set[str] = set()
        for first in range(0, len(leaving), STEP_BLOCKS):
            await self._copy(leaving[first : first + STEP_BLOCKS], full)

    async def _copy(self, blocks: list[BlockHeat[Entry]], full: set[str]) -> None:
        """Copy to the first node that takes them, in the policy's order; who refuses is `full` from then."""
        while blocks:
            nodes = [node for node in await self._cluster.neighbours.addresses() if node not in full]
            if not nodes:
                return
            again: list[BlockHeat[Entry]] = []
            for node, some in assign(blocks, nodes).items():
                offered = await self._replicas.offer_all(node, [block.name for block in some])
                self.progress = self.progress._replace(copied=self.progress.copied + len(offered.there))
                if offered.left:
                    full.add(node)
                    left = set(offered.left)
                    again += [block for block in some if block.name in left]
            blocks = [block for block in again if self._index.in_host(block.name)]
