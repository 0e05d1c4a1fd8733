"""From a published run to the bytes to pull, and back to whether they are the right ones. Pure but for memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.errors import IntegrityError, PeerGone
from kvferry.handoff.digests import DIGEST_BYTES, DigestKind, digests_fit, first_difference, heads_to_check, joined_sums
from kvferry.handoff.memory import KVMemory
from kvferry.handoff.words import WORD_BYTES
from kvferry.layout import Fingerprint, KVLayout, layers_by_regions, plan_copy
from kvferry.protocol.events import StartRead
from kvferry.transport.base import BlockList, Guard, Region, RemoteRegion
from kvferry.transport.checksum import Sums
from kvferry.wire import Codec


class NodeHello(msgspec.Struct, frozen=True):
    """What a node tells its peers. `regions[i]` is the region id of the layout's region i; `digest` the kind of digests
    that its runs carry."""

    instance_id: str
    fingerprint: Fingerprint
    layout: KVLayout
    regions: tuple[int, ...]
    words_region: int
    digest: DigestKind = "xxh3"


hellos: Codec[NodeHello] = Codec(NodeHello)


class PullPlan(NamedTuple):
    """What to read for one run, and how to know that it is right (`digests` empty: only by the guard).

    `blocks` go layer after layer in the order of `layer_order`. `heads`: the digests are of these alone.
    """

    blocks: list[BlockList]
    guard: Guard
    layers: range
    target_block_ids: npt.NDArray[np.int64]
    digests: bytes
    first_block: int
    kind: DigestKind = "none"
    layer_order: tuple[int, ...] = ()
    heads: range | None = None


def plan_pull(
    wanted: StartRead,
    hello: NodeHello,
    remote: Mapping[int, RemoteRegion],
    local: Sequence[Region],
    layout: KVLayout,
    first_block: int,
    block_ids: npt.NDArray[np.int64],
) -> PullPlan:
    """Cut the run to what this side needs and map it to offsets.

    Args:
        first_block, block_ids: own blocks for the prompt's blocks `first_block` onwards.
    Raises: CompatibilityError if the layouts do not map; PeerGone if the peer withdrew a region.
    """
    run = wanted.run
    low = max(run.first_block, first_block)
    high = min(run.first_block + run.num_blocks, first_block + len(block_ids))
    guard = Guard(hello.words_region, wanted.slot * WORD_BYTES, wanted.word)
    if low >= high:
        return PullPlan([], guard, run.layers, block_ids[:0], b"", low)
    source_ids = run.block_ids[low - run.first_block : high - run.first_block]
    target_ids = block_ids[low - first_block : high - first_block]
    blocks = [
        BlockList(
            _require_region(remote, hello.regions[copy.source_region]),
            local[copy.target_region],
            copy.source_offsets,
            copy.target_offsets,
            copy.nbytes,
        )
        for copy in plan_copy(hello.layout, layout, run.layers, source_ids, target_ids)
    ]
    digests = b""
    heads = heads_to_check(hello.layout, layout.tp_rank, layout.tp_size)
    if run.digest and (heads is not None or digests_fit(hello.layout, layout)):
        digests = run.digest[(low - run.first_block) * DIGEST_BYTES : (high - run.first_block) * DIGEST_BYTES]
    by_regions = layers_by_regions(hello.layout, layout, run.layers)
    order = tuple(layer for group in by_regions.values() for layer in group)
    kind = hello.digest if digests else "none"
    return PullPlan(blocks, guard, run.layers, target_ids, digests, low, kind, order, heads)


def check_digests(plan: PullPlan, memory: KVMemory, layout: KVLayout, sums: Sums | None = None) -> None:
    """Look at what was read, if there is a way to.

    Args:
        sums: checksums that the transport took while it read, in the order of the plan's blocks.
    Raises: IntegrityError naming the first block that is not what the source published; TransportError, TransferTimeout
        where a GPU did not look.
    """
    if plan.kind == "sum" and plan.heads is None and sums is not None:
        seen = joined_sums(sums, plan.layer_order)
    else:
        seen = memory.digests(plan.kind, layout, plan.layers, plan.target_block_ids, plan.heads)
    if not seen:
        return
    bad = first_difference(plan.digests, seen) if len(seen) == len(plan.digests) else 0
    if bad is not None:
        raise IntegrityError(
            f"block {plan.first_block + bad} of the prompt, layers {plan.layers.start} to {plan.layers.stop - 1}: its "
            f"bytes differ from what the source published ({plan.kind}); bytes were changed on the way or in memory",
            stage="verifying",
        )


def _require_region(remote: Mapping[int, RemoteRegion], region_id: int) -> RemoteRegion:
    if region_id not in remote:
        raise PeerGone(f"the source no longer serves region {region_id}", stage="pulling")
    return remote[region_id]
