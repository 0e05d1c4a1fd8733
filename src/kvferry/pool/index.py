"""The node's index: which blocks lie where, who holds them, what leaves. No I/O; used on one thread.

A block is absent, pending (a slab is being filled; nobody sees it), or committed: in a slab, in a disk slot, or both.
Slabs are freed only when no hold is left on them. Ways that a slab is held: a get's lease, a pin, a disk write.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Sequence

from kvferry.errors import InvalidTransition, RegistrationError
from kvferry.policy.eviction import Place
from kvferry.policy.eviction_choice import create_eviction
from kvferry.pool.arena import Arena
from kvferry.pool.entries import Entry, Key, PendingBlock, Put, SpaceBooks
from kvferry.pool.epochs import FIRST, Epoch, Epochs, new_epoch
from kvferry.pool.keys import BlockSpace, Tier


class BlockIndex:
    """All blocks of one node."""

    def __init__(self, arena: Arena, *, eviction: str, quotas: dict[str, int] | None = None) -> None:
        """
        Args:
            quotas: bytes of host memory (whole slabs count) that a namespace may fill, over all its fingerprints.
        Raises: ConfigError for an unknown eviction policy.
        """
        self.arena = arena
        self.epochs = Epochs()
        self.num_replicas = 0
        self._quotas = quotas or {}
        self._policy = create_eviction(eviction, arena.num_slabs, tuple[int, bytes])
        self._spaces: dict[BlockSpace, SpaceBooks] = {}
        self._numbers: list[SpaceBooks] = []
        self._names: list[BlockSpace] = []
        self._used: dict[str, int] = {}
        self._recent: dict[str, OrderedDict[Key, None]] = {}
        self._held: set[Key] = set()
        self._freed_slots: list[int] = []
        # Blocks that came or went since they were last asked for; the last word on each.
        self._changes: dict[Key, bool] = {}
        self._num_pending = 0
        self._num_removed_slabs = 0
        self.evictions = 0

    # Looking

    def tiers(self, space: BlockSpace, hashes: Sequence[bytes]) -> list[Tier | None]:
        """For each block the fastest tier that holds it; None for a miss."""
        known = self._spaces.get(space)
        return [None] * len(hashes) if known is None else list(map(known.tiers.get, hashes))

    def find(self, space: BlockSpace, hashes: Sequence[bytes]) -> list[Entry | None]:
        """The committed blocks among these."""
        known = self._spaces.get(space)
        return [None] * len(hashes) if known is None else [known.entries.get(h) for h in hashes]

    def spaces(self) -> list[tuple[BlockSpace, int, int]]:
        """Each space that has blocks, with their number in any tier and its bytes in host memory."""
        return [
            (space, len(known.entries), known.num_in_host * self.arena.slab_bytes)
            for space, known in self._spaces.items()
            if known.entries
        ]

    def used_bytes(self) -> dict[str, int]:
        """Bytes of host memory by namespace, slabs that are being filled too."""
        return {namespace: slabs * self.arena.slab_bytes for namespace, slabs in self._used.items()}

    def served_most(self, namespace: str, limit: int) -> list[Entry]:
        """The blocks of a namespace that served most often, most first."""
        entries = [
            e for space, known in self._spaces.items() if space.namespace == namespace for e in known.entries.values()
        ]
        return heapq.nsmallest(limit, entries, key=lambda entry: (-entry.reuses, entry.place.depth))

    def space_of(self, entry: Entry) -> BlockSpace:
        """The space that a block belongs to."""
        return self._names[entry.key[0]]

    def all_in_host(self) -> list[Entry]:
        """The blocks in host memory."""
        return [self._numbers[number].entries[h] for recent in self._recent.values() for number, h in recent]

    def names(self) -> list[tuple[BlockSpace, bytes]]:
        """Every block in any tier."""
        return [(space, block_hash) for space, known in self._spaces.items() for block_hash in known.entries]

    def take_changes(self) -> dict[tuple[BlockSpace, bytes], bool]:
        """Blocks that came (True) or went (False) since the last call."""
        changes, self._changes = self._changes, {}
        return {(self._names[number], block_hash): came for (number, block_hash), came in changes.items()}

    def roots_of(self, entries: Sequence[Entry]) -> list[bytes]:
        """For each block the hash of the first block of its prompt, or of the last one before a gap."""
        roots: dict[Key, bytes] = {}
        for entry in entries:
            path: list[Key] = []
            at: Entry | None = entry
            root = entry.key[1]
            while at is not None:
                if at.key in roots:
                    root = roots[at.key]
                    break
                path.append(at.key)
                root, parent = at.key[1], at.place.parent
                before = None if parent is None else self._numbers[parent[0]].entries.get(parent[1])
                # Places are told by clients: depths that do not fall would lead in a circle.
                at = before if before is not None and before.place.depth < at.place.depth else None
            roots.update(dict.fromkeys(path, root))
        return [roots[entry.key] for entry in entries]

    # Putting

    def begin_put(
        self,
        space: BlockSpace,
        hashes: Sequence[bytes],
        nbytes: int,
        *,
        first: int,
        length: int,
        replicas: Sequence[Place[bytes]] | None = None,
    ) -> Put:
        """Take slabs for the blocks that are absent; others leave where the arena or the namespace's quota is full.

        Args:
            nbytes: of each block.
            first, length: the blocks are `first`, `first + 1`, … of a prompt of `length` blocks.
            replicas: the blocks come from another node, which knows these places of them; parents are hashes.
        Raises: RegistrationError if the blocks are larger than a slab.
        """
        if not 0 < nbytes <= self.arena.slab_bytes:
            raise RegistrationError(
                f"blocks of {nbytes} bytes; this node holds blocks of 1 to {self.arena.slab_bytes}: start it with "
                "larger slabs"
            )
        known = self._space(space)
        entries, pending, number = known.entries, known.pending, known.number
        absent: dict[bytes, tuple[int, Place[Key]]] = {}
        for index, block_hash in enumerate(hashes):
            if replicas is None:
                parent = (number, hashes[index - 1]) if index else None
                place = Place(first + index, max(length, first + index + 1), parent)
            else:
                depth, num_blocks, before = replicas[index]
                place = Place(depth, num_blocks, None if before is None else (number, before))
            entry = entries.get(block_hash)
            if entry is not None and entry.slab is not None:
                if replicas is None:
                    # A prompt that computed it again would have used it, had its prefix been there.
                    self._touch(entry, place)
            elif block_hash not in pending:
                absent.setdefault(block_hash, (index, place))
        slabs = self._make_room(space, known, len(absent))
        blocks = [
            PendingBlock(index, (number, block_hash), slab, place)
            for (block_hash, (index, place)), slab in zip(absent.items(), slabs, strict=False)
        ]
        pending.update((block.key[1], block) for block in blocks)
        self._num_pending += len(blocks)
        return Put(
            space,
            nbytes,
            self.epochs.current(space),
            blocks,
            duplicates=len(hashes) - len(absent),
            refused=len(absent) - len(blocks),
            replica=replicas is not None,
        )

    def commit_put(self, put: Put, digests: Sequence[int]) -> list[Entry]:
        """The slabs are filled: from now on readers see these blocks. What was removed meanwhile is dropped.

        Args:
            digests: xxh3-64 of each of `put.blocks`.
        """
        known, stored = self._space(put.space), list[Entry]()
        stale = put.replica and put.epoch != self.epochs.current(put.space)
        filled = list(zip(put.blocks, digests, strict=True))
        for block, digest in reversed(filled) if self._policy.deepest_first else filled:
            self._end_pending(known, block)
            entry = known.entries.get(block.key[1])
            if stale or block.cancelled or (entry is not None and entry.slab is not None):
                self._free_slab(put.space.namespace, block.slab)
                continue
            if entry is not None and (entry.digest != digest or entry.nbytes != put.nbytes):
                # It was on disk only, with other bytes: a digest must fit the slab and the slot alike.
                self._forget(known, entry)
                entry = None
            if entry is None:
                entry = Entry(block.key, put.nbytes, digest, block.place)
                known.entries[block.key[1]] = entry
                self._changes[block.key] = True
            self._in_host(known, entry, block.slab, replica=put.replica)
            stored.append(entry)
        return stored

    def abort_put(self, put: Put) -> None:
        """The slabs were not filled, and nobody writes into them any more."""
        known = self._space(put.space)
        for block in put.blocks:
            self._end_pending(known, block)
            self._free_slab(put.space.namespace, block.slab)

    # Using

    def use(self, entries: Sequence[Entry], *, length: int = 0) -> None:
        """Tell the policy that these blocks of one prompt of `length` blocks, in prefix order, served a request."""
        for entry in reversed(entries) if self._policy.deepest_first else entries:
            entry.reuses += 1
            depth, num_blocks, parent = entry.place
            if num_blocks == length > depth:
                self._touch(entry, entry.place)
            else:
                self._touch(entry, Place(depth, max(length, depth + 1), parent))

    def in_host(self, entry: Entry) -> bool:
        """Whether the block can be held now: it was not removed, and has a slab."""
        return entry.slab is not None and not entry.removed

    def hold(self, entry: Entry) -> None:
        """Keep the block's slab as it is until `release`."""
        if entry.slab is None:
            raise InvalidTransition(f"block {entry.key[1].hex()}", "on disk", "hold")
        entry.holds += 1
        self._held.add(entry.key)

    def release(self, entry: Entry) -> None:
        """End one hold; a block that was removed meanwhile gives its slab back with the last one."""
        if entry.holds < 1:
            raise InvalidTransition(f"block {entry.key[1].hex()}", "not held", "release")
        entry.holds -= 1
        if entry.holds:
            return
        if entry.removed:
            assert entry.slab is not None
            self._num_removed_slabs -= 1
            self._free_slab(self.space_of(entry).namespace, entry.slab)
            entry.slab = None
        else:
            self._held.discard(entry.key)

    def pin(self, space: BlockSpace, hashes: Sequence[bytes]) -> list[Entry]:
        """Keep those of these blocks that are in host memory there, each until `unpin`; returns them."""
        found = [entry for entry in self.find(space, hashes) if entry is not None and entry.slab is not None]
        for entry in found:
            entry.pins += 1
            self.hold(entry)
        return found

    def unpin(self, entry: Entry) -> bool:
        """Take back one pin of the block; False where its removal did so before."""
        if entry.removed:
            return False
        entry.pins -= 1
        self.release(entry)
        return True

    def apply_removal(
        self,
        space: BlockSpace,
        hashes: Sequence[bytes] | None,
        *,
        previous: Epoch | None = None,
        epoch: Epoch | None = None,
    ) -> list[Entry]:
        """Misses from now on, also where a put is under way; a slab under a hold is freed with its last hold.

        Args:
            hashes: None for all of the space.
            previous: the epoch that this removal follows, if that is known. One that this node does not know shows that
                it missed a removal, whose blocks it can't know: all of the space goes.
            epoch: what this removal begins; by default a fresh one that follows the current one.
        Returns: the blocks that were there.
        """
        if previous is not None and not self.epochs.knows(space, previous):
            hashes = None
        if epoch is None:
            epoch, previous = new_epoch(), self.epochs.current(space)
            self.epochs.own.add(space)
        self.epochs.enter(space, epoch, FIRST if previous is None else previous, emptied=hashes is None)
        known = self._spaces.get(space)
        if known is None:
            return []
        if hashes is None:
            hashes = [*known.entries, *(h for h in known.pending if h not in known.entries)]
        removed: list[Entry] = []
        for block_hash in hashes:
            pending = known.pending.get(block_hash)
            if pending is not None:
                pending.cancelled = True
            entry = known.entries.get(block_hash)
            if entry is not None:
                self._forget(known, entry)
                removed.append(entry)
        return removed

    # Disk

    def on_disk(self, entry: Entry, slot: int) -> None:
        """The block lies in this disk slot too."""
        entry.slot = slot

    def adopt(self, space: BlockSpace, block_hash: bytes, nbytes: int, digest: int, slot: int) -> bool:
        """A block that the disk held when the node started; False if the block is known already."""
        known = self._space(space)
        if block_hash in known.entries:
            return False
        entry = Entry((known.number, block_hash), nbytes, digest, Place(), slot=slot)
        known.entries[block_hash] = entry
        known.tiers[block_hash] = Tier.DISK
        self._changes[entry.key] = True
        return True

    def begin_load(self, entry: Entry) -> int | None:
        """A slab into which a block that is on disk only may be read; None where there is no room."""
        space = self.space_of(entry)
        slabs = self._make_room(space, self._space(space), 1)
        self._num_pending += len(slabs)
        return slabs[0] if slabs else None

    def end_load(self, entry: Entry, slab: int, *, good: bool) -> None:
        """The slab holds the block's bytes; or (not `good`) it does not: the block on disk is broken and forgotten."""
        space = self.space_of(entry)
        known = self._space(space)
        self._num_pending -= 1
        if not good or entry.removed or entry.slab is not None:
            self._free_slab(space.namespace, slab)
            if not good and not entry.removed:
                self._forget(known, entry)
            return
        self._in_host(known, entry, slab)

    def leave_disk(self, entry: Entry) -> None:
        """The disk gives the block's slot to another."""
        entry.slot = None
        if entry.slab is None and not entry.removed:
            self._forget(self._space(self.space_of(entry)), entry)

    def take_freed_slots(self) -> list[int]:
        """Disk slots of blocks that were forgotten since the last call."""
        freed, self._freed_slots = self._freed_slots, []
        return freed

    def check_integrity(self) -> None:
        """Raises: AssertionError unless free, pending and occupied slabs are all there are, each with one owner."""
        entries = [e for known in self._spaces.values() for e in known.entries.values()]
        in_host = [e for e in entries if e.slab is not None]
        total = self.arena.num_free + self._num_pending + len(in_host) + self._num_removed_slabs
        assert total == self.arena.num_slabs, f"{total} slabs accounted for, {self.arena.num_slabs} exist"
        assert len({e.slab for e in in_host}) == len(in_host), "two blocks share a slab"
        assert {e.key for e in in_host} == {e.key for e in self.all_in_host()}, "blocks in use order and blocks differ"
        told = {h: tier for known in self._spaces.values() for h, tier in known.tiers.items()}
        assert told == {e.key[1]: Tier.DISK if e.slab is None else Tier.HOST for e in entries}, (
            "tiers are not the blocks'"
        )
        assert sum(e.replica for e in in_host) == self.num_replicas, "replicas are miscounted"
        assert {e.key for e in in_host if e.holds} == self._held, "held keys and holds differ"
        assert len(self._policy) == len(in_host), f"the policy knows {len(self._policy)} of {len(in_host)} blocks"
        used = sum(self._used.values())
        assert used == self.arena.num_slabs - self.arena.num_free, f"{used} slabs are charged to namespaces"

    # Inside

    def _space(self, space: BlockSpace) -> SpaceBooks:
        known = self._spaces.get(space)
        if known is None:
            recent = self._recent.setdefault(space.namespace, OrderedDict())
            known = SpaceBooks(len(self._numbers), self._quotas.get(space.namespace), recent=recent)
            self._spaces[space] = known
            self._numbers.append(known)
            self._names.append(space)
        return known

    def _make_room(self, space: BlockSpace, known: SpaceBooks, count: int) -> list[int]:
        """Take at most `count` slabs; others leave where the arena or the namespace's quota is full."""
        slabs: list[int] = []
        while len(slabs) < count:
            wanted = count - len(slabs)
            if known.quota is not None:
                below = known.quota // self.arena.slab_bytes - self._used.get(space.namespace, 0)
                if below < 1:
                    own = list(itertools.islice((key for key in known.recent if key not in self._held), wanted))
                    for key in own:
                        self._policy.discard(key)
                    self._leave_host(own)
                    wanted = len(own)
                else:
                    wanted = min(wanted, below)
            if self.arena.num_free < wanted:
                self._leave_host(self._policy.evict_many(wanted - self.arena.num_free, self._held))
            taken = self.arena.take(wanted)
            if not taken:
                break
            self._used[space.namespace] = self._used.get(space.namespace, 0) + len(taken)
            slabs += taken
        return slabs

    def _in_host(self, known: SpaceBooks, entry: Entry, slab: int, *, replica: bool = False) -> None:
        entry.slab, entry.replica = slab, replica
        self.num_replicas += replica
        known.recent[entry.key] = None
        known.num_in_host += 1
        known.tiers[entry.key[1]] = Tier.HOST
        self._policy.insert(entry.key, entry.place)

    def _leave_host(self, keys: Sequence[Key]) -> None:
        """Evicted: their slabs are free; each block stays where it is on disk, too."""
        self.evictions += len(keys)
        slabs: list[int] = []
        for key in keys:
            known = self._numbers[key[0]]
            entry = known.entries[key[1]]
            assert entry.slab is not None
            slabs.append(entry.slab)
            entry.slab = None
            self._no_replica(entry)
            del known.recent[key]
            known.num_in_host -= 1
            self._used[self._names[key[0]].namespace] -= 1
            if entry.slot is None:
                self._forget(known, entry)
            else:
                known.tiers[key[1]] = Tier.DISK
        self.arena.give(slabs)

    def _forget(self, known: SpaceBooks, entry: Entry) -> None:
        entry.removed = True
        del known.entries[entry.key[1]], known.tiers[entry.key[1]]
        self._changes[entry.key] = False
        if entry.slot is not None:
            self._freed_slots.append(entry.slot)
            entry.slot = None
        if entry.slab is None:
            return
        self._no_replica(entry)
        self._policy.discard(entry.key)
        del known.recent[entry.key]
        known.num_in_host -= 1
        self._held.discard(entry.key)
        while entry.pins:
            entry.pins -= 1
            entry.holds -= 1
        if entry.holds:
            self._num_removed_slabs += 1
        else:
            self._free_slab(self.space_of(entry).namespace, entry.slab)
            entry.slab = None

    def _no_replica(self, entry: Entry) -> None:
        self.num_replicas -= entry.replica
        entry.replica = False

    def _touch(self, entry: Entry, place: Place[Key]) -> None:
        if entry.slab is not None and entry.key in self._policy:
            entry.place = place
            self._policy.touch(entry.key, place)
            self._numbers[entry.key[0]].recent.move_to_end(entry.key)

    def _end_pending(self, known: SpaceBooks, block: PendingBlock) -> None:
        del known.pending[block.key[1]]
        self._num_pending -= 1

    def _free_slab(self, namespace: str, slab: int) -> None:
        self.arena.give((slab,))
        self._used[namespace] -= 1
