"""What a node says of itself: its figures, its blocks, and the spaces of all nodes. On the node's event loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvferry.observe import PoolReading
from kvferry.pool.disk_queue import DiskQueue
from kvferry.pool.figures import Figures
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import Tier
from kvferry.pool.leases import Leases
from kvferry.pool.messages import AskStat, BlockStat, NodeStat, SpaceStat
from kvferry.pool.neighbours import Cluster

ASK_S = 2.0


class Standing:
    """One node's."""

    def __init__(
        self,
        index: BlockIndex,
        leases: Leases,
        disk: DiskQueue | None,
        figures: Figures,
        *,
        address: Callable[[], str],
        state: Callable[[], str],
        quotas: Mapping[str, int],
    ) -> None:
        """
        Args:
            state: serving, draining or drained.
        """
        self._index, self._leases, self._disk, self._figures = index, leases, disk, figures
        self._address, self._state, self._quotas = address, state, quotas

    def stat(self, request_id: int = 0) -> NodeStat:
        """The node's figures now."""
        index, disk = self._index, self._disk
        return NodeStat(
            id=request_id,
            address=self._address(),
            num_slabs=index.arena.num_slabs,
            free_slabs=index.arena.num_free,
            slab_bytes=index.arena.slab_bytes,
            disk_slots=0 if disk is None else disk.num_slots,
            blocks_on_disk=0 if disk is None else disk.num_blocks,
            disk_queued_bytes=0 if disk is None else disk.queued_bytes,
            leases=len(self._leases),
            replicas=index.num_replicas,
            state=self._state(),
            counts={**self._figures.counts, "evictions": index.evictions},
            latencies_ms=self._figures.latencies_ms(),
            namespaces=self._figures.namespaces(index.used_bytes(), self._quotas),
            spaces=[
                SpaceStat(space.fingerprint.hex(), space.namespace, blocks, host_bytes)
                for space, blocks, host_bytes in index.spaces()
            ],
        )

    def metrics(self) -> tuple[bytes, str]:
        """The body of `/metrics` and its content type."""
        stat = self.stat()
        return self._figures.render(
            PoolReading(
                events=stat.counts,
                slabs={"used": stat.num_slabs - stat.free_slabs, "free": stat.free_slabs},
                disk_slots={"used": stat.blocks_on_disk, "free": stat.disk_slots - stat.blocks_on_disk},
                disk_queued_bytes=stat.disk_queued_bytes,
                leases=stat.leases,
                replicas=stat.replicas,
                draining=stat.state != "serving",
            )
        )

    def served_most(self, namespace: str, limit: int) -> list[BlockStat]:
        """The blocks of a namespace that served most often."""
        return [
            BlockStat(
                fingerprint=self._index.space_of(entry).fingerprint.hex(),
                block_hash=entry.key[1].hex(),
                tier=Tier.DISK if entry.slab is None else Tier.HOST,
                nbytes=entry.nbytes,
                depth=entry.place.depth,
                reuses=entry.reuses,
                pins=entry.pins,
                copy=entry.replica,
            )
            for entry in self._index.served_most(namespace, limit)
        ]

    async def spaces_everywhere(self, cluster: Cluster | None) -> list[SpaceStat]:
        """Each space once, over all nodes of the directory. Raises: KVError where a node can't be asked."""
        stats = [self.stat()]
        if cluster is not None:
            neighbours = cluster.neighbours
            for address in await neighbours.addresses():
                node = await neighbours.connect(address, deadline_s=ASK_S)
                stats.append(await neighbours.ask(node, AskStat(neighbours.new_id()), NodeStat, deadline_s=ASK_S))
        total: dict[tuple[str, str], SpaceStat] = {}
        for space in (space for stat in stats for space in stat.spaces):
            key = space.fingerprint, space.namespace
            before = total.get(key, SpaceStat(*key, 0, 0))
            total[key] = SpaceStat(*key, before.blocks + space.blocks, before.host_bytes + space.host_bytes)
        return list(total.values())
