"""The beacon of an owner: a page that says who it is, whether it serves, and which regions are registered.

For one-sided transports, where nothing runs at the owner to check a request. Layout, in 8-byte words: nonce, alive,
incarnation, five spare, then one slot for each region. A slot holds a nonce made from the region's token while the
region is registered, and 0 otherwise: readers look at it before and after the copy.
"""

from __future__ import annotations

import contextlib
import secrets
import threading

from kvferry.errors import RegistrationError
from kvferry.transport.base import Region
from kvferry.transport.copying import store_word
from kvferry.transport.memory import PAGE_BYTES, SharedBuffer
from kvferry.types import Incarnation

MAX_REGIONS = 4096
NONCE, ALIVE, INCARNATION, FIRST_SLOT = 0, 8, 16, 64
BEACON_BYTES = -(-(FIRST_SLOT + 8 * MAX_REGIONS) // PAGE_BYTES) * PAGE_BYTES


class Beacon:
    """The owner's side. Thread-safe."""

    def __init__(self, incarnation: Incarnation) -> None:
        self.buffer = SharedBuffer(BEACON_BYTES, name="kvferry-beacon")
        self.nonce = secrets.randbits(63) | 1
        self._lock = threading.Lock()
        self._free_slots = list(range(MAX_REGIONS - 1, -1, -1))
        self._slots: dict[int, int] = {}
        store_word(self.buffer.address + NONCE, self.nonce)
        store_word(self.buffer.address + INCARNATION, incarnation)
        store_word(self.buffer.address + ALIVE, 1)

    def add(self, region: Region) -> int:
        """Show the region as registered; its slot. Raises: RegistrationError when every slot is in use."""
        with self._lock:
            if not self._free_slots:
                raise RegistrationError(f"{MAX_REGIONS} regions are registered, the most there can be; unregister some")
            slot = self._slots[region.region_id] = self._free_slots.pop()
        store_word(self.buffer.address + slot_offset(slot), slot_nonce(region.token))
        return slot

    def remove(self, region: Region) -> None:
        """Show the region as gone. Idempotent."""
        with self._lock:
            slot = self._slots.pop(region.region_id, None)
            if slot is not None:
                store_word(self.buffer.address + slot_offset(slot), 0)
                self._free_slots.append(slot)

    def close(self) -> None:
        """Show the owner and all its regions as gone. Idempotent."""
        store_word(self.buffer.address + ALIVE, 0)
        with self._lock:
            for slot in self._slots.values():
                store_word(self.buffer.address + slot_offset(slot), 0)
            self._slots.clear()
        self.buffer.close()


def slot_offset(slot: int) -> int:
    """Byte offset of a slot in the beacon. Raises: RegistrationError for a slot that there can't be."""
    if not 0 <= slot < MAX_REGIONS:
        raise RegistrationError(f"slot {slot} is none of {MAX_REGIONS}: the peer lies, or is of another version")
    return FIRST_SLOT + 8 * slot


def slot_nonce(token: str) -> int:
    """The non-zero 63 bits that stand for a region's token in the beacon; 1 for a token that is no hex."""
    with contextlib.suppress(ValueError):
        return int(token[:16], 16) >> 1 | 1
    return 1
