"""Huge pages under shared memory, where this kernel gives them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from kvferry.transport.huge import collapse
from kvferry.transport.memory import HUGE_PAGE_BYTES, Mapping, SharedBuffer

SIZE = 4 * HUGE_PAGE_BYTES


def huge_bytes_at(address: int) -> int:
    """How much of the mapping at this address huge pages back, as this process sees it."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(f"{address:x}-"))
    return 1024 * int(next(line for line in lines if line.startswith("ShmemPmdMapped")).split()[1])


def test_no_byte_changes_and_every_mapping_has_huge_pages() -> None:
    memory = SharedBuffer(SIZE)
    written = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
    memory.array[:] = written
    backed = collapse(memory.address, memory.nbytes)
    assert (memory.array == written).all()
    if not backed:
        pytest.skip(f"Linux {os.uname().release} gives no huge pages here")
    assert backed == SIZE == huge_bytes_at(memory.address)
    other = Mapping(memory.fd, SIZE, writable=False)
    assert (np.asarray(other) == written).all()
    assert huge_bytes_at(other.address) == SIZE


def test_only_whole_huge_pages_inside_of_the_range_are_touched() -> None:
    memory = SharedBuffer(SIZE)
    assert collapse(memory.address + 1, HUGE_PAGE_BYTES) == 0
    assert collapse(memory.address + 1, 2 * HUGE_PAGE_BYTES) in (0, HUGE_PAGE_BYTES)
    assert huge_bytes_at(memory.address) in (0, HUGE_PAGE_BYTES)


def test_it_ends_when_asked() -> None:
    memory = SharedBuffer(SIZE)
    assert collapse(memory.address, memory.nbytes, stopped=lambda: True) == 0
    assert huge_bytes_at(memory.address) == 0
