"""What a pool node can be told."""

from __future__ import annotations

import msgspec

from kvferry.policy.eviction_choice import BEST_POLICY


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one node. Sizes in bytes, times in seconds.

    `slab_bytes` is the room of one block: the largest block that the node takes. `quotas` bounds the bytes in host
    memory of single namespaces. `lease_ttl_s` bounds how long one get may go on reading; `node_ttl_s` is the node's
    own lease in the directory. `max_copies` is how many nodes may hold a hot block; 1 copies none.
    """

    arena_bytes: int = 1 << 30
    slab_bytes: int = 1 << 20
    eviction: str = BEST_POLICY
    quotas: dict[str, int] = {}
    disk_path: str | None = None
    disk_bytes: int = 4 << 30
    lease_ttl_s: float = 10.0
    max_leases: int = 4096
    node_ttl_s: float = 3.0
    max_copies: int = 2
    pull_deadline_s: float = 30.0
