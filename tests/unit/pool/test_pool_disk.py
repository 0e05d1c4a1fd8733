"""The disk tier: what survives, what is found out, what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvferry.errors import ConfigError, IntegrityError, PoolExhausted
from kvferry.pool.disk import HEADER_BYTES, NUM_FILES, DiskTier, SlotHeader
from kvferry.transport.memory import SharedBuffer

SLAB = 8192


def open_tier(path: Path, num_slots: int = 4) -> DiskTier:
    return DiskTier(path, slab_bytes=SLAB, disk_bytes=num_slots * SLAB)


def block(number: int, nbytes: int = SLAB) -> tuple[np.ndarray, SlotHeader]:
    memory = SharedBuffer(SLAB).array
    memory[:nbytes] = np.random.default_rng(number).integers(0, 256, nbytes, dtype=np.uint8)
    digest = xxhash.xxh3_64_intdigest(memory[:nbytes].data)
    return memory, SlotHeader(b"f" * 32, "tenant", number.to_bytes(4, "big"), nbytes, digest)


def write(tier: DiskTier, number: int, nbytes: int = SLAB) -> int:
    slot, _ = tier.take()
    assert slot is not None
    tier.write(slot, *block(number, nbytes))
    tier.used(slot)
    return slot


def test_blocks_survive_a_restart(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    slots = [write(tier, number, 5000) for number in range(3)]
    tier.give(slots[1])
    tier.close()
    tier = open_tier(tmp_path)
    found = {f.slot: f.header for f in tier.found}
    assert set(found) == {slots[0], slots[2]}
    for number in (0, 2):
        memory = SharedBuffer(SLAB).array
        tier.read(slots[number], memory, found[slots[number]])
        assert (memory[:5000] == block(number, 5000)[0][:5000]).all()
    tier.close()


def test_every_slot_has_a_place_of_its_own(tmp_path: Path) -> None:
    count = 2 * NUM_FILES + 3
    tier = open_tier(tmp_path, count)
    written = {write(tier, number): number for number in range(count)}
    tier.close()
    assert sum(path.stat().st_size for path in tmp_path.glob("blocks-*")) == count * SLAB
    tier = open_tier(tmp_path, count)
    for slot, header in tier.found:
        memory = SharedBuffer(SLAB).array
        tier.read(slot, memory, header)
        assert (memory == block(written[slot])[0]).all()
    assert {slot for slot, _ in tier.found} == set(range(count)) == set(written)
    tier.close()


def test_a_flipped_bit_is_not_served(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    slot, header = write(tier, 1), block(1)[1]
    with (tmp_path / f"blocks-{slot % NUM_FILES}").open("r+b") as raw:
        raw.seek(slot // NUM_FILES * SLAB + 4321)
        byte = raw.read(1)
        raw.seek(-1, 1)
        raw.write(bytes([byte[0] ^ 4]))
    with pytest.raises(IntegrityError, match="flipped bit"):
        tier.read(slot, SharedBuffer(SLAB).array, header)
    tier.close()


@pytest.mark.parametrize("cut", ["header wiped", "header torn", "bytes torn"])
def test_an_interrupted_write_is_a_miss(tmp_path: Path, cut: str) -> None:
    tier = open_tier(tmp_path)
    slot = write(tier, 1)
    tier.close()
    name, at, damage = {
        "header wiped": ("headers", (slot + 1) * HEADER_BYTES, bytes(HEADER_BYTES)),
        "header torn": ("headers", (slot + 1) * HEADER_BYTES + 40, b"\xff" * 20),
        "bytes torn": (f"blocks-{slot % NUM_FILES}", slot // NUM_FILES * SLAB + SLAB // 2, bytes(SLAB // 2)),
    }[cut]
    with (tmp_path / name).open("r+b") as raw:
        raw.seek(at)
        raw.write(damage)
    tier = open_tier(tmp_path)
    if cut == "bytes torn":
        with pytest.raises(IntegrityError):
            tier.read(slot, SharedBuffer(SLAB).array, tier.found[0].header)
    else:
        assert tier.found == []
        assert tier.broken == (cut == "header torn")
        assert {tier.take()[0] for _ in range(4)} == {0, 1, 2, 3}
    tier.close()


def test_the_block_unused_longest_gives_its_slot(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 3)
    first, second, third = (write(tier, number) for number in range(3))
    tier.used(first)
    assert tier.take({second}) == (third, True)
    assert tier.take({first, second}) == (None, False)
    tier.close()


def test_two_nodes_cannot_share_a_directory_and_sizes_must_fit(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    with pytest.raises(ConfigError, match="another node uses"):
        open_tier(tmp_path)
    tier.close()
    with pytest.raises(ConfigError, match="same slab size"):
        DiskTier(tmp_path, slab_bytes=2 * SLAB, disk_bytes=8 * SLAB)
    with pytest.raises(ConfigError, match="holds no slab"):
        DiskTier(tmp_path, slab_bytes=SLAB, disk_bytes=SLAB - 1)


def test_a_full_disk_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(PoolExhausted, match="give it less, or free space"):
        DiskTier(tmp_path, slab_bytes=SLAB, disk_bytes=1 << 50)
    open_tier(tmp_path / "smaller").close()


def test_ten_thousand_headers_are_read(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, slab_bytes=4096, disk_bytes=10_000 * 4096)
    memory = SharedBuffer(4096).array
    digest = xxhash.xxh3_64_intdigest(memory.data)
    for number in range(10_000):
        header = SlotHeader(b"f" * 32, "tenant", number.to_bytes(32, "big"), 4096, digest)
        tier.write(number, memory[:0], header)
    tier.close()
    began_s = time.perf_counter()
    tier = DiskTier(tmp_path, slab_bytes=4096, disk_bytes=10_000 * 4096)
    print(f"10,000 headers in {time.perf_counter() - began_s:.3f} s")
    assert len(tier.found) == 10_000
    tier.close()
