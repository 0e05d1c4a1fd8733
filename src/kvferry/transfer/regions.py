"""The memory that an engine has registered."""

from __future__ import annotations

import itertools
import secrets
import threading
import weakref
from typing import Any

import numpy as np

from kvferry.errors import RegistrationError
from kvferry.transport.base import MemoryKind, Region
from kvferry.transport.memory import SharedBuffer, find_backing


class RegionTable:
    """Live regions by id. Thread-safe; an id is never given twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._regions: dict[int, Region] = {}
        self._read_only: set[int] = set()
        self._ids = itertools.count(1)
        self._allocated: weakref.WeakSet[SharedBuffer] = weakref.WeakSet()

    def allocate(self, nbytes: int, *, writable: bool, name: str) -> Region:
        """Fresh shared memory, zeroed. Raises: RegistrationError, TransportError."""
        buffer = SharedBuffer(nbytes, name=name)
        self._allocated.add(buffer)
        return self.add(buffer.array, writable=writable)

    def add(self, buffer: Any, *, writable: bool) -> Region:
        """Register a contiguous numpy array or torch tensor. Raises: RegistrationError."""
        address, nbytes, kind, device, read_only = _memory_of(buffer)
        if writable and read_only:
            raise RegistrationError("read-only memory cannot be lent out for writing")
        backing = find_backing(address, nbytes) if kind == "host" else None
        region = Region(
            region_id=next(self._ids),
            address=address,
            nbytes=nbytes,
            token=secrets.token_hex(16),
            kind=kind,
            device=device,
            writable=writable,
            backing=(backing[0].fd, backing[1]) if backing else None,
            buffer=buffer,
        )
        with self._lock:
            self._regions[region.region_id] = region
            if read_only:
                self._read_only.add(region.region_id)
        return region

    def remove(self, region: Region) -> None:
        """Raises: RegistrationError if the region is not registered (any more)."""
        with self._lock:
            self._require(region)
            del self._regions[region.region_id]
            self._read_only.discard(region.region_id)

    def clear(self) -> None:
        """Forget every region; peers can map none of what was allocated here any more."""
        with self._lock:
            self._regions.clear()
            self._read_only.clear()
        for buffer in list(self._allocated):
            buffer.close()

    def find(self, region_id: int) -> Region | None:
        return self._regions.get(region_id)

    def all(self) -> list[Region]:
        with self._lock:
            return list(self._regions.values())

    def require(self, region: object, *, target: bool) -> Region:
        """The region, if it is registered here (and may be written to, for a `target`). Raises: RegistrationError."""
        if not isinstance(region, Region):
            raise RegistrationError(f"expected a region registered here, saw {type(region).__name__}")
        self._require(region)
        if target and region.region_id in self._read_only:
            raise RegistrationError(f"region {region.region_id} is read-only memory and cannot be read into")
        return region

    def takes(self, region: object) -> bool:
        """Whether this very object is registered here and may be read into. Quick; `require` says why not."""
        if not isinstance(region, Region):
            return False
        known = self._regions.get(region.region_id)
        return known is region and region.region_id not in self._read_only

    def _require(self, region: Region) -> None:
        known = self._regions.get(region.region_id)
        if known is None or known.token != region.token:
            raise RegistrationError(f"region {region.region_id} is not registered here (any more)")


def _memory_of(buffer: Any) -> tuple[int, int, MemoryKind, int, bool]:
    """Address, size, kind, device and whether it is read-only. Raises: RegistrationError."""
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous or not buffer.nbytes:
            raise RegistrationError(
                f"an array {buffer.shape} with strides {buffer.strides} is not contiguous, or empty"
            )
        if buffer.dtype.hasobject:
            raise RegistrationError("an array of Python objects cannot be registered")
        return buffer.ctypes.data, buffer.nbytes, "host", 0, not buffer.flags.writeable
    if not all(hasattr(buffer, name) for name in ("data_ptr", "is_contiguous", "device")):
        raise RegistrationError(f"{type(buffer).__name__} is neither a numpy array nor a torch tensor")
    nbytes = int(buffer.numel() * buffer.element_size())
    if not buffer.is_contiguous() or not nbytes:
        raise RegistrationError(f"a tensor {tuple(buffer.shape)} is not contiguous, or empty")
    if buffer.device.type not in ("cpu", "cuda"):
        raise RegistrationError(f"memory on {buffer.device} cannot be registered; host and CUDA memory can")
    kind: MemoryKind = "host" if buffer.device.type == "cpu" else "cuda"
    return int(buffer.data_ptr()), nbytes, kind, int(buffer.device.index or 0), False
