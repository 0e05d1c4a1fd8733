"""One read or write: validated, cut into slices, moved over the best way, retried on the next."""

from __future__ import annotations

import time

import numpy as np

from kvferry.errors import (
    HandoffAborted,
    IntegrityError,
    KVError,
    LeaseExpired,
    PeerGone,
    RegistrationError,
    TransferTimeout,
    TransportClosed,
    TransportError,
)
from kvferry.transfer.jobs import Job
from kvferry.transfer.peer import Completion, Peer, Way
from kvferry.transfer.regions import RegionTable
from kvferry.transfer.ways import Ways
from kvferry.transport.base import BlockList, Guard, RemoteRegion, StopToken
from kvferry.transport.blocks import check_blocks
from kvferry.transport.checksum import Sums
from kvferry.transport.copying import batches

CUDA_SLICE_BYTES = 1 << 30
"""What a step moves into GPU memory: some 3 ms over NVLink, where `slice_bytes` of host memory take tens."""


class Transfer:
    """A transfer under way. `step` is called by one thread at a time until it returns False.

    Raises (constructor): RegistrationError, PeerGone: nothing was moved.
    """

    def __init__(
        self,
        peer: Peer,
        blocks: BlockList | list[BlockList],
        guard: Guard | None,
        deadline_s: float,
        *,
        writing: bool,
        regions: RegionTable,
        ways: Ways,
        slice_bytes: int,
        suspend_s: float,
        summing: bool = False,
    ) -> None:
        self._began_s = time.monotonic()
        self._until_s = self._began_s + deadline_s
        self._deadline_s = deadline_s
        if peer.lost is not None:
            raise peer.lost
        self.peer, self.stop = peer, StopToken()
        self.closed = False
        self.job: Job | None = None
        self._guard, self._writing, self._ways, self._suspend_s = guard, writing, ways, suspend_s
        blocks = [blocks] if isinstance(blocks, BlockList) else blocks
        for part in blocks:
            self._require_regions(part, regions)
        blocks = check_blocks(blocks)
        self.nbytes = self._num_blocks = 0
        most = CUDA_SLICE_BYTES
        for source, target, offsets, _, nbytes in blocks:
            self._num_blocks += len(offsets)
            self.nbytes += len(offsets) * nbytes
            if (source if writing else target).kind != "cuda":
                most = slice_bytes
        self._slices = [blocks] if self.nbytes <= most else batches(blocks, most)
        self._next = 0
        self._retries = 0
        self._scheme = ""
        self._sums: list[Sums] | None = [] if summing else None

    @property
    def step_bytes(self) -> int:
        """The most that one step moves."""
        return max((sum(part.total_bytes for part in piece) for piece in self._slices[:1]), default=0)

    def step(self) -> bool:
        """Move the next slice; whether there is another one. Raises: see TransferEngine.read."""
        blocks = self._slices[self._next]
        last = self._next == len(self._slices) - 1
        try:
            if blocks:
                self._move(blocks, self._guard if last else None)
            elif self._guard is not None:
                self._check_guard(self._guard)
        except HandoffAborted as error:
            raise self._why_stopped(error) from error
        self._next += 1
        return not last

    def completion(self) -> Completion:
        sums = None if self._sums is None else np.concatenate([np.empty(0, dtype=np.int64), *self._sums])
        if sums is not None and len(sums) != self._num_blocks:
            sums = None  # a block was cut into slices, and its sum is none of theirs
        return Completion(self.nbytes, time.monotonic() - self._began_s, self._scheme, self._retries, sums)

    def remaining_s(self) -> float:
        return self._until_s - time.monotonic()

    def load_word(self, region: RemoteRegion, offset: int) -> int:
        """A word of the peer, over the first way that can. Raises: as `step` does."""
        failure: KVError | None = None
        for attempt in range(2):
            for way in list(self.peer.ways):
                link = way.link
                if link is None or way.scheme not in region.handles:
                    continue
                try:
                    return link.load_word(region, offset, deadline_s=self._remaining())
                except (RegistrationError, TransferTimeout):
                    raise
                except TransportError as error:
                    failure = error
            if attempt == 0:
                if not self.peer.ways:
                    self._ways.open(self.peer, self._remaining())
                if failure is not None or self.peer.ways:
                    self._ways.open_standby(self.peer, self._remaining())
        raise failure or self._no_way()

    def why_failed(self) -> KVError:
        """The error of a transfer that was taken out of the queue before it ran."""
        return self._why_stopped(HandoffAborted("the transfer was cancelled", peer=self.peer.name))

    def _move(self, blocks: list[BlockList], guard: Guard | None) -> None:
        tried: set[Way] = set()
        failure: KVError | None = None
        while True:
            way = self._ways.best(self.peer, blocks, writing=self._writing, deadline_s=self._remaining(), tried=tried)
            if way is None:
                if self.peer.lost is not None:
                    raise self.peer.lost
                if self._ways.open_standby(self.peer, self._remaining()):
                    continue
                raise failure or self._no_way()
            tried.add(way)
            try:
                self._move_over(way, blocks, guard)
            except (RegistrationError, LeaseExpired, HandoffAborted, TransferTimeout):
                raise
            except (TransportError, IntegrityError) as error:
                if self.peer.lost is not None or self.closed:
                    raise HandoffAborted("stopped") from error
                way.suspended_until_s = time.monotonic() + self._suspend_s
                way.why = f"failed: {error}"
                self._retries += 1
                failure = error
                continue
            way.suspended_until_s = 0.0
            self._scheme = way.scheme
            return

    def _move_over(self, way: Way, blocks: list[BlockList], guard: Guard | None) -> None:
        link = way.link
        if link is None:
            raise PeerGone("the link to the peer was closed", peer=self.peer.name)
        remaining_s = self._remaining()
        if self._writing:
            link.write(blocks, stop=self.stop, deadline_s=remaining_s)
            return
        elsewhere = guard is not None and way.scheme not in self._guard_region(guard).handles
        watched = None if elsewhere else guard
        if self._sums is None:
            link.read(blocks, guard=watched, stop=self.stop, deadline_s=remaining_s)
        else:
            sums = link.read_summed(blocks, guard=watched, stop=self.stop, deadline_s=remaining_s)
            self._sums = None if sums is None else self._sums + sums
        if elsewhere and guard is not None:
            self._check_guard(guard)

    def _check_guard(self, guard: Guard) -> None:
        if self.load_word(self._guard_region(guard), guard.offset) != guard.word:
            raise LeaseExpired("the lease's word changed: recompute", peer=self.peer.name)

    def _guard_region(self, guard: Guard) -> RemoteRegion:
        region = self.peer.regions.get(guard.region_id)
        if region is None:
            raise RegistrationError(f"the peer has no region {guard.region_id} (any more)", peer=self.peer.name)
        return region

    def _require_regions(self, part: BlockList, regions: RegionTable) -> None:
        local, remote = (part.source, part.target) if self._writing else (part.target, part.source)
        regions.require(local, target=not self._writing)
        known = self.peer.regions.get(remote.region_id) if isinstance(remote, RemoteRegion) else None
        if not isinstance(remote, RemoteRegion) or known is None or known.token != remote.token:
            raise RegistrationError(
                f"{self.peer.name} has no region {remote.region_id} with this token: it was unregistered, belongs to "
                "another peer, or the token is wrong; use peer.regions"
            )
        if remote.nbytes > known.nbytes:
            raise RegistrationError(f"region {remote.region_id} has {known.nbytes} bytes, not {remote.nbytes}")
        if self._writing and not known.writable:
            raise RegistrationError(f"region {remote.region_id} of {self.peer.name} was not lent out for writing")

    def _remaining(self) -> float:
        remaining_s = self._until_s - time.monotonic()
        if remaining_s <= 0:
            raise TransferTimeout(f"the transfer was not complete within {self._deadline_s:.3f} s", peer=self.peer.name)
        return remaining_s

    def _why_stopped(self, error: HandoffAborted) -> KVError:
        if self.peer.lost is not None:
            return self.peer.lost
        if self.closed:
            return TransportClosed("the transfer engine was closed during this transfer", peer=self.peer.name)
        if time.monotonic() >= self._until_s:
            return TransferTimeout(
                f"the transfer was not complete within {self._deadline_s:.3f} s", peer=self.peer.name
            )
        return error

    def _no_way(self) -> KVError:
        reasons = "; ".join(f"{way.scheme}: {way.why}" for way in self.peer.ways)
        return TransportError(f"no transport serves these regions: {reasons}", peer=self.peer.name)


_INT64 = np.dtype(np.int64)
_ONE = (1,)


def read_block(
    peer: Peer, block: BlockList, guard: Guard | None, deadline_s: float, regions: RegionTable
) -> Completion | None:
    """The short way for one block over the best link: the same checks as `Transfer`, without its objects.

    None where anything is out of the ordinary, also where the link failed: `Transfer` then does it, or says why not.
    """
    began_s = time.monotonic()
    remote, local, sources, targets, nbytes = block
    ways = peer.ways
    if peer.lost is not None or not ways or deadline_s <= 0 or peer.regions.get(remote.region_id) is not remote:
        return None
    # What is no array has no shape; the long way says so.
    if getattr(sources, "shape", None) != _ONE or getattr(targets, "shape", None) != _ONE:
        return None
    if sources.dtype != _INT64 or targets.dtype != _INT64:
        return None
    if not regions.takes(local) or local.kind != "host":
        return None
    source, target = sources.item(), targets.item()
    if source < 0 or target < 0 or nbytes < 1 or source + nbytes > remote.nbytes or target + nbytes > local.nbytes:
        return None
    way = ways[0]
    link, scheme = way.link, way.scheme
    if link is None or way.suspended_until_s or scheme not in remote.handles:
        return None
    if guard is not None:
        holder = peer.regions.get(guard.region_id)
        if holder is None or scheme not in holder.handles:
            return None
    try:
        link.read_block(block, guard=guard, deadline_s=deadline_s)
    except (RegistrationError, LeaseExpired, TransferTimeout):
        raise
    except (TransportError, IntegrityError):
        return None
    return Completion(nbytes, time.monotonic() - began_s, scheme, 0)
