"""Block ids of one instance's KV memory: which are free, held or cached. No torch, no bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvferry.errors import PoolExhausted


class BlockPool:
    """Reference counts over `num_blocks` block ids, and prefix reuse by block hash.

    A block with references is held. A block without is free; if it still has a hash, its bytes can be found again
    until it is taken for something else, least recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks without a reference; cached ones count, because they can be taken."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks, free or held, whose bytes can be found by hash."""
        return len(self._hash_of)

    def lookup(self, hashes: Sequence[bytes]) -> list[int]:
        """The cached blocks of the longest prefix of `hashes`. Takes no reference."""
        found = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def reserve(self, num_blocks: int, cached: Sequence[int] = ()) -> list[int]:
        """Hold `cached` (from `lookup`) and take fresh blocks until there are `num_blocks`.

        Raises:
            PoolExhausted: not enough free blocks; nothing was taken.
        """
        num_fresh = num_blocks - len(cached)
        num_available = len(self._free) - sum(self._references[b] == 0 for b in cached)
        if num_fresh > num_available:
            raise PoolExhausted(
                f"{num_fresh} fresh blocks are needed, {num_available} of {self.num_blocks} are free; "
                "wait for a request to end"
            )
        for block_id in cached:
            self._hold(block_id)
        return [*cached, *(self._take() for _ in range(num_fresh))]

    def hold(self, block_ids: Sequence[int]) -> None:
        """Add one reference to each of these held blocks."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                raise RuntimeError(f"block {block_id} is free and cannot be held on to: a bug, it is another's")
            self._references[block_id] += 1

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Let the bytes of a held block be found by their hash. The first block of a hash keeps it."""
        if block_hash not in self._block_of and block_id not in self._hash_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one reference of each block. Blocks late in a sequence are reused before early ones."""
        for block_id in reversed(block_ids):
            if self._references[block_id] == 0:
                raise RuntimeError(f"block {block_id} was released but is not held: a bug, it would be used twice")
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._hash_of:
                    self._free.move_to_end(block_id, last=False)

    def forget_cached(self) -> None:
        """Drop every hash, so that nothing is reused any more. Held blocks stay held."""
        self._hash_of.clear()
        self._block_of.clear()

    def check_integrity(self) -> None:
        """Raises: RuntimeError if the tables contradict each other; the message says which."""
        num_referenced = sum(count > 0 for count in self._references)
        if num_referenced + len(self._free) != self.num_blocks:
            raise RuntimeError(
                f"{len(self._free)} free + {num_referenced} held blocks are not the {self.num_blocks} of this pool"
            )
        wrong = [b for b in self._free if self._references[b]]
        if wrong:
            raise RuntimeError(f"blocks {wrong[:8]} are free and held at once")
        if {h: b for b, h in self._hash_of.items()} != self._block_of:
            raise RuntimeError("the two directions of the hash table differ")

    def _hold(self, block_id: int) -> None:
        if self._references[block_id] == 0:
            del self._free[block_id]
        self._references[block_id] += 1

    def _take(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        old_hash = self._hash_of.pop(block_id, None)
        if old_hash is not None:
            del self._block_of[old_hash]
        self._references[block_id] = 1
        return block_id
