"""Transport between GPUs of one host: the reader's GPU pulls scattered blocks out of the peer's memory (CUDA IPC).

An owner exports the IPC handle of each registered CUDA tensor's allocation. A reader opens the handle once, on its own
device, and copies a whole batch with one kernel (or several, each of bounded size, so that a stop is bounded), straight
from the peer's blocks into its own: over NVLink between two GPUs, within the memory of one.

Identity, liveness and tokens are those of the shm transport: its beacon tells whether the peer lives and whether a
region is still registered under its token; both are looked at before and after each copy. What the driver guarantees
of memory whose owner died is not relied on: a copy during which the peer died is an error, and the handles are closed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Set
from collections.abc import Mapping as Dict
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np

from kvferry.errors import LeaseExpired, PeerGone, RegistrationError, TransportClosed, TransportError
from kvferry.layout import Offsets
from kvferry.transport import cuda_runtime as cuda
from kvferry.transport.base import BlockList, Guard, Link, Region, RemoteRegion, StopToken, Transport
from kvferry.transport.blocks import check_blocks, require_inside
from kvferry.transport.checksum import COPY_AND_SUM, SUM, Sums
from kvferry.transport.copying import Limits, slices
from kvferry.transport.cuda_copy import BlockCopier, CudaSettings, Path, Run
from kvferry.transport.cuda_merge import merged, parted
from kvferry.transport.inproc import require_word
from kvferry.transport.registry import TransportContext
from kvferry.transport.shm import ShmLink, ShmTransport
from kvferry.types import Incarnation

__all__ = ["CudaLink", "CudaSettings", "CudaTransport", "merged"]


class CudaTransport(Transport):
    """Serves one engine's CUDA memory to processes of the same host and user, and reads theirs."""

    scheme: ClassVar[str] = "cuda"

    def __init__(self, context: TransportContext, settings: CudaSettings | None = None) -> None:
        """Raises: TransportError where this process sees no GPU."""
        self.settings = settings or CudaSettings()
        self.uuids = cuda.device_uuids()
        self._beacon = ShmTransport(context)
        self._lock = threading.Lock()
        self._copiers: dict[int, BlockCopier] = {}
        self._pinned: dict[int, int] = {}
        self._summing: set[int] = set()
        self._links: weakref.WeakSet[CudaLink] = weakref.WeakSet()

    def offer(self) -> Dict[str, Any]:
        return {"beacon": self._beacon.offer(), "pid": os.getpid(), "devices": self.uuids}

    def export(self, region: Region) -> dict[str, Any] | None:
        """Also makes the region's device ready to copy: compiles the kernels, which takes seconds the first time."""
        if region.kind != "cuda":
            return None
        shared = cuda.ipc_handle(region.address, region.nbytes, region.device)
        self.copier(region.device)
        slot = self._beacon.export(msgspec.structs.replace(region, kind="host", backing=None))
        return {
            "beacon": slot,
            "handle": shared.handle,
            "offset": shared.offset,
            "uuid": self.uuids[region.device],
            "device": region.device,
            "address": region.address,
        }

    def withdraw(self, region: Region) -> None:
        self._beacon.withdraw(region)
        with self._lock:
            pinned = self._pinned.pop(region.region_id, None)
        if pinned is not None:
            cuda.unpin(pinned)

    def connect(self, offer: Dict[str, Any], *, peer: str, incarnation: Incarnation, deadline_s: float) -> Link:
        beacon = self._beacon.connect(offer["beacon"], peer=peer, incarnation=incarnation, deadline_s=deadline_s)
        assert isinstance(beacon, ShmLink)
        link = CudaLink(self, beacon, offer, peer=peer)
        self._links.add(link)
        return link

    def copy(self, blocks: list[BlockList], *, stop: StopToken, deadline_s: float) -> None:
        """Copy between two local regions, of which at least one is CUDA memory: a cache's blocks out to pinned host
        memory, or back, in one launch. Host regions are pinned on first use and stay so until withdrawn.

        Raises and failure as for `Link.read`.
        """
        limits = Limits(stop, deadline_s, "this process")
        runs: dict[int, list[Run]] = {}
        for part in self.bounded(check_blocks(blocks)):
            assert isinstance(part.source, Region) and isinstance(part.target, Region)
            device = self.device_of(part.source, part.target)
            path: Path = "device" if part.source.kind == part.target.kind else "host"
            source, target = self.address_of(part.source, device), self.address_of(part.target, device)
            run = Run(part.source_offsets, source, part.target_offsets, target, part.nbytes, path)
            runs.setdefault(device, []).append(run)
        for device, of_device in runs.items():
            self.copier(device).copy(merged(of_device), limits)

    def sums(self, region: Region, offsets: Offsets, nbytes: int, *, deadline_s: float) -> Sums | None:
        """On a stream of its own, beside the model. The first call makes the device ready for sums, in seconds."""
        if region.kind != "cuda":
            return None
        require_inside(offsets, nbytes, region, "summed")
        copier = self.copier(region.device)
        if region.device not in self._summing:
            copier.warm(COPY_AND_SUM, SUM)
            self._summing.add(region.device)
        sums = np.empty(len(offsets), dtype=np.int64)
        run = Run(offsets, region.address, offsets, region.address, nbytes, "device")
        copier.sum([run], Limits(StopToken(), deadline_s, "this process"), [sums])
        return sums

    def close(self) -> None:
        for link in list(self._links):
            link.close()
        with self._lock:
            copiers, self._copiers = self._copiers, {}
            pinned, self._pinned = self._pinned, {}
        for copier in copiers.values():
            copier.close()
        for address in pinned.values():
            cuda.unpin(address)
        self._beacon.close()

    def copier(self, device: int) -> BlockCopier:
        """What copies with this device's SMs; made on first use."""
        with self._lock:
            if (copier := self._copiers.get(device)) is None:
                copier = BlockCopier(device, self.settings)
                copier.warm()
                self._copiers[device] = copier
            return copier

    def bounded(self, blocks: list[BlockList]) -> Iterator[BlockList]:
        """The same copies; blocks larger than a launch may be are cut."""
        most = self.settings.launch_bytes
        for part in blocks:
            if part.nbytes > most:
                return slices(blocks, most)
        return iter(blocks)

    def is_stuck(self) -> bool:
        return any(copier.stuck for copier in self._copiers.values())

    def device_of(self, *regions: Region) -> int:
        """The device that copies between these local regions.

        Raises: TransportError if none is CUDA memory.
        """
        for region in regions:
            if region.kind == "cuda":
                return region.device
        raise TransportError("cuda copies nothing between two host regions; use shm or tcp")

    def address_of(self, region: Region, device: int) -> int:
        """A local region's address for kernels on `device`; pins host memory, enables peer access."""
        if region.kind == "host":
            with self._lock:
                if region.region_id not in self._pinned and cuda.pin(region.address, region.nbytes):
                    self._pinned[region.region_id] = region.address
        elif region.device != device:
            with cuda.use(device):
                cuda.enable_peer_access(region.device)
        return region.address


class _Remote(NamedTuple):
    """A peer's region: as the beacon knows it, with its address here, the way to it, and what was opened for it."""

    shadow: RemoteRegion
    address: int
    path: Path
    opened: tuple[int, bytes] | None


class CudaLink(Link):
    """The way into one process's GPU memory. Holds the allocations opened so far, each for one device of this side."""

    scheme: ClassVar[str] = "cuda"

    def __init__(self, transport: CudaTransport, beacon: ShmLink, offer: Dict[str, Any], *, peer: str) -> None:
        self._transport, self._beacon, self._peer = transport, beacon, peer
        self._same_process = int(offer["pid"]) == os.getpid()
        self._idle = threading.Condition()
        self._copies: set[object] = set()
        self._num_waiting = 0
        self._closed = False
        self._opened: dict[tuple[int, bytes], int] = {}
        self._remotes: dict[tuple[int, int], _Remote] = {}

    def read(self, blocks: list[BlockList], *, guard: Guard | None, stop: StopToken, deadline_s: float) -> None:
        self._read(blocks, guard, stop, deadline_s, None)

    def read_summed(
        self, blocks: list[BlockList], *, guard: Guard | None, stop: StopToken, deadline_s: float
    ) -> list[Sums] | None:
        """Sums of the blocks as they were loaded, by the kernel that copies them."""
        if any(part.nbytes > self._transport.settings.launch_bytes for part in blocks):
            return super().read_summed(blocks, guard=guard, stop=stop, deadline_s=deadline_s)
        sums = [np.empty(len(part.source_offsets), dtype=np.int64) for part in blocks]
        self._read(blocks, guard, stop, deadline_s, sums)
        return sums

    def _read(
        self, blocks: list[BlockList], guard: Guard | None, stop: StopToken, deadline_s: float, sums: list[Sums] | None
    ) -> None:
        word = self._move(blocks, guard, stop, deadline_s, writing=False, sums=sums)
        if guard is not None and word != guard.word:
            raise LeaseExpired("the lease's word changed while its blocks were read: recompute", peer=self._peer)

    def write(self, blocks: list[BlockList], *, stop: StopToken, deadline_s: float) -> None:
        self._move(blocks, None, stop, deadline_s, writing=True)

    def load_word(self, region: RemoteRegion, offset: int, *, deadline_s: float) -> int:
        require_word(offset, region.nbytes, self._peer)
        limits = Limits(StopToken(), deadline_s, self._peer)
        with _Copying(self):
            device = self._device_for(region)
            remote = self._remote(region, device)
            word = self._transport.copier(device).copy([], limits, check=self._check, word=remote.address + offset)
            self._beacon._require_registered(remote.shadow)
        return word

    def close(self) -> None:
        """Waits for copies under way (they end at their next launch), then closes what was opened of the peer."""
        with self._idle:
            self._closed = True
            self._wait_for(self._copies)
            opened, self._opened = self._opened, {}
        self._close_opened(opened)
        self._beacon.close()

    def forget(self, region: RemoteRegion) -> None:
        """Closes what was opened for the region, unless another one lies in it. Waits for copies under way."""
        with self._idle:
            gone = [key for key, remote in self._remotes.items() if remote.shadow.token == region.token]
            unused = {self._remotes.pop(key).opened for key in gone} - {r.opened for r in self._remotes.values()}
            opened = {key: self._opened.pop(key) for key in unused if key in self._opened}
            under_way = set(self._copies) if opened else set()
            self._wait_for(under_way)
        self._close_opened(opened)
        self._beacon.forget(region)

    def _close_opened(self, opened: Dict[tuple[int, bytes], int]) -> None:
        if self._transport.is_stuck():
            return  # a kernel that never ended may still use them
        for (device, _handle), address in opened.items():
            with cuda.use(device):
                cuda.close_ipc_handle(address)

    def _move(
        self,
        blocks: list[BlockList],
        guard: Guard | None,
        stop: StopToken,
        deadline_s: float,
        *,
        writing: bool,
        sums: list[Sums] | None = None,
    ) -> int:
        """The guard's word as loaded after the copy; 0 without one."""
        transport = self._transport
        limits = Limits(stop, deadline_s, self._peer)
        runs: dict[int, list[Run]] = {}
        places: dict[int, list[int]] = {}
        remotes: dict[tuple[int, int], _Remote] = {}
        with _Copying(self):
            for place, (origin, goal, source_offsets, target_offsets, nbytes) in enumerate(transport.bounded(blocks)):
                theirs, ours = (goal, origin) if writing else (origin, goal)
                assert isinstance(theirs, RemoteRegion) and isinstance(ours, Region)
                on_gpu = ours.kind == "cuda"
                device = ours.device if on_gpu else self._device_for(theirs)
                if (remote := remotes.get((theirs.region_id, device))) is None:
                    remote = remotes[theirs.region_id, device] = self._remote(theirs, device)
                here = ours.address if on_gpu else transport.address_of(ours, device)
                there, path = remote.address, remote.path if on_gpu else "host"
                source, target = (here, there) if writing else (there, here)
                run = Run(source_offsets, source, target_offsets, target, nbytes, path)
                if device not in runs:
                    runs[device], places[device] = [], []
                runs[device].append(run)
                places[device].append(place)
            last = next(reversed(runs), None)
            at = self._guard_address(guard, remotes, last) if guard is not None and last is not None else None
            word = 0
            for device, of_device in runs.items():
                # The last copy loads the word: after all bytes, in stream order behind its own.
                loaded = at if device == last else None
                copier = transport.copier(device)
                joined = merged(of_device)
                taken = None if sums is None else [np.empty(len(run.source_offsets), dtype=np.int64) for run in joined]
                word = copier.copy(joined, limits, check=self._check, word=loaded, sums=taken)
                if sums is not None and taken is not None:
                    parted(of_device, taken, [sums[place] for place in places[device]])
            for remote in remotes.values():
                self._beacon._require_registered(remote.shadow)
        return word

    def _guard_address(self, guard: Guard, remotes: dict[tuple[int, int], _Remote], device: int) -> int:
        region = self.guard_region(guard)
        require_word(guard.offset, region.nbytes, self._peer)
        if (remote := remotes.get((region.region_id, device))) is None:
            remote = remotes[region.region_id, device] = self._remote(region, device)
        return remote.address + guard.offset

    def _remote(self, region: RemoteRegion, device: int) -> _Remote:
        """Raises: RegistrationError if the peer no longer serves the region under this token, or never did."""
        known = self._remotes.get((region.region_id, device))
        if known is None or known.shadow.token != region.token:
            known = self._find(region, device)
        self._beacon._require_registered(known.shadow)
        return known

    def _find(self, region: RemoteRegion, device: int) -> _Remote:
        handle = region.handles.get("cuda")
        if handle is None:
            raise RegistrationError(f"region {region.region_id} is not offered over cuda", peer=self._peer)
        shadow = msgspec.structs.replace(region, handles={"shm": handle["beacon"]})
        self._beacon._require_registered(shadow)
        path: Path = "device" if handle["uuid"] == self._transport.uuids[device] else "peer"
        if self._same_process and int(handle["device"]) != device:
            with cuda.use(device):
                cuda.enable_peer_access(int(handle["device"]))
        with self._idle:
            # Entered as it is opened, so that `forget` of a neighbour in the same allocation does not close it.
            if self._same_process:
                remote = _Remote(shadow, int(handle["address"]), path, None)
            else:
                opened = device, bytes(handle["handle"])
                remote = _Remote(shadow, self._open(*opened) + int(handle["offset"]), path, opened)
            self._remotes[region.region_id, device] = remote
        return remote

    def _open(self, device: int, handle: bytes) -> int:
        """The first address of the peer's allocation on `device`; opened once."""
        with self._idle:
            if (base := self._opened.get((device, handle))) is None:
                with cuda.use(device):
                    try:
                        base = self._opened[device, handle] = cuda.open_ipc_handle(handle)
                    except TransportError as error:
                        raise TransportError(
                            f"the peer's GPU memory cannot be opened on device {device}: {error.message}. Are both "
                            "GPUs linked (nvidia-smi topo -m)?",
                            peer=self._peer,
                        ) from error
        return base

    def _device_for(self, region: RemoteRegion) -> int:
        """The device that reads where the local side names none: the region's own GPU if visible, else the first."""
        uuid = region.handles.get("cuda", {}).get("uuid")
        return self._transport.uuids.index(uuid) if uuid in self._transport.uuids else 0

    def _check(self) -> None:
        if self._closed:
            raise TransportClosed("the link to the peer was closed by this side", peer=self._peer)
        self._beacon._require_alive()

    def _begin(self, copy: object) -> None:
        with self._idle:
            if self._closed:
                raise PeerGone("the link to the peer was closed", peer=self._peer)
            self._copies.add(copy)
        try:
            self._check()
        except BaseException as error:
            self._end(copy, error)
            raise

    def _end(self, copy: object, error: BaseException | None) -> None:
        with self._idle:
            self._copies.discard(copy)
            if self._num_waiting:
                self._idle.notify_all()
        if isinstance(error, PeerGone):
            self.close()

    def _wait_for(self, copies: Set[object]) -> None:
        """Until these copies, or whatever the set has by then, are over. Holds the lock, but for the wait."""
        self._num_waiting += 1
        try:
            while copies & self._copies:
                self._idle.wait()
        finally:
            self._num_waiting -= 1


class _Copying:
    """One copy over a link: counted, so that `close` waits for it; a peer found dead has its handles closed behind the
    last one. A class, for a generator's context takes 2 us a copy."""

    __slots__ = ("_link",)

    def __init__(self, link: CudaLink) -> None:
        self._link = link

    def __enter__(self) -> None:
        self._link._begin(self)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._link._end(self, error)
