"""Transport between processes of one host and user: the reader maps the owner's memory, or copies across processes.

Memory from `SharedBuffer` is mapped (through /proc/PID/fd, read-only unless it was lent out for writing) and copied
with wide moves; other host memory is copied with process_vm_readv and process_vm_writev. Nothing runs at the owner.

The owner's beacon (beacon.py), a page that peers map, tells before and after each copy whether the region is still
registered, so that a wrong token or freed memory is refused before any byte moves.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping as Dict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.errors import LeaseExpired, PeerGone, RegistrationError, TransportError
from kvferry.transport.base import BlockList, Guard, Link, Region, RemoteRegion, StopToken, Transport
from kvferry.transport.beacon import (
    ALIVE,
    BEACON_BYTES,
    INCARNATION,
    MAX_REGIONS,
    NONCE,
    Beacon,
    slot_nonce,
    slot_offset,
)
from kvferry.transport.copying import (
    OTHER_WORD,
    SLICE_BYTES,
    SMALL_BYTES,
    STANDS,
    Limits,
    copy_checked,
    copy_list,
    is_dead,
    load_word,
    slices,
)
from kvferry.transport.inproc import require_word
from kvferry.transport.memory import Mapping, size_is_sealed
from kvferry.transport.registry import TransportContext
from kvferry.transport.vectors import MAX_VECTORS, copy_process, vectors_of
from kvferry.types import Incarnation


class ShmHandle(msgspec.Struct, frozen=True):
    """What an owner tells of a region: its beacon slot, its address there, and its file where it can be mapped."""

    slot: int
    address: int
    fd: int | None = None
    inode: int = 0
    offset: int = 0


class _Place(NamedTuple):
    """A mapped region as a small read needs it: its first byte here, its slot, what the slot must hold."""

    region: RemoteRegion
    address: int
    slot: int
    nonce: int
    kept: Mapping


class ShmTransport(Transport):
    """Serves one engine's host memory to processes of the same host and user."""

    scheme: ClassVar[str] = "shm"

    def __init__(self, context: TransportContext) -> None:
        self._beacon = Beacon(context.incarnation)

    def offer(self) -> Dict[str, Any]:
        beacon = self._beacon
        return {"pid": os.getpid(), "fd": beacon.buffer.fd, "nonce": beacon.nonce, "host": _boot_id()}

    def export(self, region: Region) -> dict[str, Any] | None:
        if region.kind != "host":
            return None
        handle = ShmHandle(self._beacon.add(region), region.address)
        if region.backing is not None:
            fd, offset = region.backing
            handle = msgspec.structs.replace(handle, fd=fd, inode=os.fstat(fd).st_ino, offset=offset)
        told: dict[str, Any] = msgspec.to_builtins(handle)
        return told

    def withdraw(self, region: Region) -> None:
        self._beacon.remove(region)

    def connect(self, offer: Dict[str, Any], *, peer: str, incarnation: Incarnation, deadline_s: float) -> Link:
        return ShmLink(offer, peer=peer, incarnation=incarnation)

    def close(self) -> None:
        self._beacon.close()


class ShmLink(Link):
    """The way into one process's memory. Holds its beacon, a pidfd and the mappings made so far."""

    scheme: ClassVar[str] = "shm"

    def __init__(self, offer: Dict[str, Any], *, peer: str, incarnation: Incarnation) -> None:
        if offer["host"] != _boot_id():
            raise TransportError("the peer runs on another host (boot id differs)", peer=peer)
        self._pid, self._peer = int(offer["pid"]), peer
        try:
            self.pidfd = os.pidfd_open(self._pid)
        except OSError as error:
            raise TransportError(
                f"process {self._pid} is not visible here ({error.strerror}): it is dead, or lives in another PID "
                "namespace (containers: share it with --pid)",
                peer=peer,
            ) from error
        self._lock = threading.Lock()
        self._mappings: dict[tuple[int, bool], Mapping] = {}
        self._slots: dict[tuple[int, str], tuple[int, int]] = {}
        self._handles: dict[tuple[int, str], ShmHandle] = {}
        self._places: dict[str, _Place] = {}
        self._closed = False
        # Its thread starts with the first large copy.
        self._helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvferry-shm-copy")
        try:
            self._beacon = self._map_file(int(offer["fd"]), None, writable=False, least=BEACON_BYTES)
            self._words = self._beacon.address
            seen = load_word(self._words + NONCE), load_word(self._words + INCARNATION)
            if seen != (int(offer["nonce"]), incarnation):
                raise TransportError(f"process {self._pid} is another one than the peer: its beacon differs", peer=peer)
        except BaseException:
            os.close(self.pidfd)
            raise

    def read(self, blocks: list[BlockList], *, guard: Guard | None, stop: StopToken, deadline_s: float) -> None:
        self._copy(blocks, stop, deadline_s, writing=False)
        if guard is None:
            return
        if self.load_word(self.guard_region(guard), guard.offset, deadline_s=deadline_s) != guard.word:
            raise LeaseExpired("the lease's word changed while its blocks were read: recompute", peer=self._peer)

    def read_block(self, block: BlockList, *, guard: Guard | None, deadline_s: float) -> None:
        remote, local, sources, targets, nbytes = block
        place = self._places.get(remote.token)
        if place is not None and place.region is remote and nbytes <= SMALL_BYTES:
            target, source = local.address + targets.item(), place.address + sources.item()  # type: ignore[union-attr]
            found: int | None
            if guard is None:
                found = copy_checked(target, source, nbytes, self.pidfd, place.slot, place.nonce)
            else:
                found = self._copy_guarded(target, source, nbytes, place, guard)
            if found == STANDS and not self._closed:
                return
            if found == OTHER_WORD:
                raise LeaseExpired("the lease's word changed while its blocks were read: recompute", peer=self._peer)
        # What is wrong, or not known yet, the long way finds out.
        super().read_block(block, guard=guard, deadline_s=deadline_s)
        assert isinstance(remote, RemoteRegion)
        self._remember(remote)
        if guard is not None:
            self._remember(self.guard_region(guard))

    def _copy_guarded(self, target: int, source: int, nbytes: int, place: _Place, guard: Guard) -> int | None:
        """What `copy_checked` found; None where the word's region is not known yet, or has no such word."""
        region_id, offset, word = guard
        holder = self.regions.get(region_id)
        words = None if holder is None else self._places.get(holder.token)
        if (
            words is None
            or words.region is not holder
            or word < 0
            or offset % 8
            or not 0 <= offset <= holder.nbytes - 8
        ):
            return None
        address = words.address + offset
        return copy_checked(
            target, source, nbytes, self.pidfd, place.slot, place.nonce, words.slot, words.nonce, address, word
        )

    def _remember(self, remote: RemoteRegion) -> None:
        base, kept = self._base(remote, writing=False)
        if base is None or kept is None:
            return
        slot, nonce = self._find_slot(remote)
        with self._lock:
            if not self._closed and self.regions.get(remote.region_id) is remote:
                self._places[remote.token] = _Place(remote, base, slot, nonce, kept)

    def write(self, blocks: list[BlockList], *, stop: StopToken, deadline_s: float) -> None:
        self._copy(blocks, stop, deadline_s, writing=True)

    def load_word(self, region: RemoteRegion, offset: int, *, deadline_s: float) -> int:
        require_word(offset, region.nbytes, self._peer)
        self._require_registered(region)
        base, _kept = self._base(region, writing=False)
        if base is not None:
            word = load_word(base + offset)
        else:
            value = np.zeros(1, dtype=np.int64)
            here = vectors_of(value.ctypes.data, np.zeros(1, dtype=np.int64), 8)
            there = vectors_of(
                self._handles[region.region_id, region.token].address, np.array([offset], dtype=np.int64), 8
            )
            copy_process(self._pid, here, there, writing=False, peer=self._peer)
            word = int(value[0])
        self._require_alive()
        self._require_registered(region)
        return word

    def mapped(self, region: RemoteRegion) -> npt.NDArray[np.uint8] | None:
        self._require_registered(region)
        base, mapping = self._base(region, writing=False)
        if base is None or mapping is None:
            return None
        first = base - mapping.address
        return np.asarray(mapping)[first : first + region.nbytes]

    def forget(self, region: RemoteRegion) -> None:
        key = region.region_id, region.token
        with self._lock:
            self._places.pop(region.token, None)
            self._slots.pop(key, None)
            handle = self._handles.pop(key, None)
            if handle is not None and all(o.inode != handle.inode for o in list(self._handles.values())):
                # Mapped, the memory would stay the owner's for as long as this link lives.
                self._mappings.pop((handle.inode, False), None)
                self._mappings.pop((handle.inode, True), None)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # A copy under way keeps its own reference; the last one unmaps.
            self._mappings.clear()
            self._places.clear()
            os.close(self.pidfd)
        self._helper.shutdown(wait=True)

    def _copy(self, blocks: list[BlockList], stop: StopToken, deadline_s: float, *, writing: bool) -> None:
        limits = Limits(stop, deadline_s, self._peer)
        bases: list[tuple[int | None, Mapping | None]] = []
        for part in blocks:
            remote = part.target if writing else part.source
            self._require_registered(remote)
            bases.append(self._base(remote, writing=writing))
        total = blocks[0].total_bytes if len(blocks) == 1 else sum(part.total_bytes for part in blocks)
        for part, (base, _kept) in zip(blocks, bases, strict=True):
            local, remote = (part.source, part.target) if writing else (part.target, part.source)
            assert isinstance(local, Region) and isinstance(remote, RemoteRegion)
            if base is None:
                self._copy_across(part, local, remote, limits, writing=writing)
            elif writing:
                copy_list(part, base, local.address, limits, total, self._helper)
            else:
                copy_list(part, local.address, base, limits, total, self._helper)
        # Alive after the copy: so the process was the peer all the while, not a later one with its number.
        self._require_alive()
        for part in blocks:
            self._require_registered(part.target if writing else part.source)

    def _copy_across(
        self, part: BlockList, local: Region, remote: RemoteRegion, limits: Limits, *, writing: bool
    ) -> None:
        for piece in slices([part], SLICE_BYTES, MAX_VECTORS):
            limits.check()
            here, there = piece.target_offsets, piece.source_offsets
            if writing:
                here, there = there, here
            copy_process(
                self._pid,
                vectors_of(local.address, here, piece.nbytes),
                vectors_of(self._handle(remote).address, there, piece.nbytes),
                writing=writing,
                peer=self._peer,
            )

    def _base(self, remote: Region | RemoteRegion, *, writing: bool) -> tuple[int | None, Mapping | None]:
        """Address of the region's first byte in this process, or None where it can't be mapped; and what keeps it."""
        assert isinstance(remote, RemoteRegion)
        handle = self._handle(remote)
        if handle.fd is None:
            return None, None
        key = (handle.inode, writing)
        mapping = self._mappings.get(key)
        if mapping is None:
            with self._lock:
                if self._closed:
                    raise PeerGone("the link to the peer was closed", peer=self._peer)
                mapping = self._mappings.get(key)
                if mapping is None:
                    least = handle.offset + remote.nbytes
                    mapping = self._map_file(handle.fd, key[0], writable=writing, least=least)
                    self._mappings[key] = mapping
        if handle.offset < 0 or handle.offset + remote.nbytes > mapping.nbytes:
            raise RegistrationError(
                f"region {remote.region_id} is larger than its file; the peer lies", peer=self._peer
            )
        return mapping.address + handle.offset, mapping

    def _map_file(self, fd: int, inode: int | None, *, writable: bool, least: int) -> Mapping:
        path = Path(f"/proc/{self._pid}/fd/{fd}")
        try:
            opened = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(
                f"cannot open {path} ({error.strerror}): the peer must run as the same user, and ptrace rules must "
                "let this process look at it",
                peer=self._peer,
            ) from error
        try:
            status = os.fstat(opened)
            # Without the seal a peer could shrink the file and crash this process.
            if status.st_size < least or not size_is_sealed(opened) or (inode is not None and status.st_ino != inode):
                raise RegistrationError(f"{path} is not the sealed memory that the peer announced", peer=self._peer)
            return Mapping(opened, status.st_size, writable=writable)
        finally:
            os.close(opened)

    def _require_registered(self, remote: Region | RemoteRegion) -> None:
        known = self._slots.get((remote.region_id, remote.token))
        if known is None:
            known = self._find_slot(remote)
        if load_word(known[0]) == known[1]:
            return
        if load_word(self._words + ALIVE) != 1:
            raise PeerGone("the peer closed its engine", peer=self._peer)
        raise RegistrationError(
            f"region {remote.region_id} is not registered there under this token: it was unregistered, or the token "
            "is wrong; use the peer's current regions",
            peer=self._peer,
        )

    def _find_slot(self, remote: Region | RemoteRegion) -> tuple[int, int]:
        """Address of the region's slot and what it must hold, remembered (ids and tokens are never given twice)."""
        assert isinstance(remote, RemoteRegion)
        try:
            handle = msgspec.convert(remote.handles.get("shm"), ShmHandle)
        except msgspec.ValidationError as error:
            raise RegistrationError(
                f"region {remote.region_id} is not offered over shm: {error}", peer=self._peer
            ) from error
        known = self._words + slot_offset(handle.slot), slot_nonce(remote.token)
        if len(self._slots) >= 2 * MAX_REGIONS:
            oldest = next(iter(self._slots))
            self._slots.pop(oldest, None)
            self._handles.pop(oldest, None)
        self._handles[remote.region_id, remote.token] = handle
        self._slots[remote.region_id, remote.token] = known
        return known

    def _handle(self, remote: RemoteRegion) -> ShmHandle:
        """What the owner told of the region; `_require_registered` has read it before."""
        known = self._handles.get((remote.region_id, remote.token))
        if known is None:
            raise RegistrationError(f"region {remote.region_id} was taken back meanwhile", peer=self._peer)
        return known

    def _require_alive(self) -> None:
        # Without a lock: closed in between, the poll fails or shows an event, and that means "gone" too.
        if self._closed or is_dead(self.pidfd):
            gone = "the link to the peer was closed" if self._closed else f"process {self._pid} is dead"
            raise PeerGone(gone, peer=self._peer)


_boot_id_text: str | None = None


def _boot_id() -> str:
    global _boot_id_text
    if _boot_id_text is None:
        _boot_id_text = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return _boot_id_text
