"""An hour of simulated trace with memory, and disk, far below the working set: misses, never another's bytes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kvferry.clock import VirtualClock
from kvferry.pool.arena import Arena, arena_bytes
from kvferry.pool.entries import Entry
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace
from kvferry.pool.leases import Leases
from kvferry.request_trace import TracedRequest, read_request_trace
from kvferry.transport.base import Region
from kvferry.transport.memory import SharedBuffer

TRACE = Path(__file__).parents[4] / "shared" / "data" / "conversation_trace.jsonl"
SPACES = (BlockSpace(b"f" * 32, "a"), BlockSpace(b"f" * 32, "b"))
SLAB = 4096


def an_hour() -> list[TracedRequest]:
    """The conversation trace where it is; else as many made-up conversations whose turns come back."""
    if TRACE.exists():
        return read_request_trace(TRACE)
    rng, chats = np.random.default_rng(5), [list[int]() for _ in range(400)]
    requests = []
    for number in range(6000):
        chat = chats[int(rng.zipf(1.3)) % len(chats)]
        chat.extend(range(number * 16, number * 16 + int(rng.integers(1, 12))))
        requests.append(TracedRequest(512 * len(chat), tuple(chat)))
    return requests


@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["hazard", "prefix"])
def test_memory_below_the_working_set_for_an_hour(policy: str) -> None:
    # Every fifth request by default: an hour's working set in a fifth of the time.
    requests = an_hour()[:: 1 if os.environ.get("KVFERRY_POOL_WHOLE_HOUR") else 5]
    capacity = 1000
    buffer = SharedBuffer(arena_bytes(capacity, SLAB, 64))
    region = Region(1, buffer.address, buffer.nbytes, "0" * 32, buffer=buffer.array)
    arena = Arena(region, slab_bytes=SLAB, num_words=64)
    index = BlockIndex(arena, eviction=policy, quotas={"b": 300 * SLAB})
    clock = VirtualClock()
    between_s = 3600.0 / len(requests)
    leases = Leases(index, clock, ttl_s=6 * between_s)
    counts: Counter[str] = Counter()
    open_leases: list[tuple[int, BlockSpace, list[Entry]]] = []

    def look(number: int, space: BlockSpace, entries: list[Entry]) -> None:
        """A reader is done: what it reads is its own tenant's block, or its lease is over."""
        if not leases.end(0, number):
            counts["late"] += 1
            return
        for entry in entries:
            assert entry.slab is not None
            seen = arena.view(entry.slab, 16).view(np.int64)
            assert tuple(seen) == (int.from_bytes(entry.key[1], "big"), SPACES.index(space)), "another's bytes"
        counts["read"] += len(entries)

    for number, request in enumerate(requests):
        clock.advance(between_s)
        space = SPACES[number % 4 == 0]
        hashes = [key.to_bytes(8, "big") for key in request.hash_ids]
        found = index.find(space, hashes)
        prefix = next((i for i, entry in enumerate(found) if entry is None), len(found))
        entries = [entry for entry in found[:prefix] if entry is not None]
        for entry in entries:
            index.hold(entry)
        if entries:
            leases.grant(0, number, entries)
            index.use(entries, length=len(hashes))
            open_leases.append((number, space, entries))
        put = index.begin_put(space, hashes[prefix:], SLAB, first=prefix, length=len(hashes))
        for block in put.blocks:
            arena.view(block.slab, 16).view(np.int64)[:] = int.from_bytes(block.key[1], "big"), SPACES.index(space)
        counts["refused"] += put.refused
        index.commit_put(put, [0] * len(put.blocks))
        # Readers take their time, now and then longer than their leases.
        while len(open_leases) > (12 if number % 100 < 30 else 3):
            look(*open_leases.pop(0))
        leases.expire()
    for each in open_leases:
        look(*each)
    index.check_integrity()
    blocks = {key for request in requests for key in request.hash_ids}
    assert len(blocks) > 10 * capacity
    assert counts["read"] > 1000
    assert counts["late"] > 10
    assert index.evictions > 10 * capacity
    assert index.used_bytes()["b"] <= 300 * SLAB
    print(f"{len(requests)} requests over {len(blocks)} blocks in {capacity} slabs: {dict(counts)}")
