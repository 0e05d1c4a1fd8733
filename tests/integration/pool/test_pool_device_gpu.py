"""The pool over a real GPU's memory. bench/gpu/pool.py checks bytes too, and measures.

Where pytest is there without its plugins and without this project's other needs:

    PYTHONPATH=src python3 -m pytest -c /dev/null --rootdir . --noconftest -p no:cacheprovider -v -rs \\
        tests/integration/pool/test_pool_device_gpu.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvferry.layout import Fingerprint, KVLayout, LayerLayout
from kvferry.observe import LISTENING
from kvferry.pool import BlockSpace, PoolAttachment

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # CUDA keeps its context's file descriptors and threads until the process ends.
    pytest.mark.leaks_allowed,
]

LAYER_BYTES, NUM_LAYERS, NUM_BLOCKS = 65536, 12, 128
BLOCK = LAYER_BYTES * NUM_LAYERS
WAIT_S = 60.0

# Each layer in a part of its own; all layers of a block side by side; blocks whose addresses are no multiples of 16.
LAYOUTS = {
    "layers": [(i * NUM_BLOCKS * LAYER_BYTES, LAYER_BYTES) for i in range(NUM_LAYERS)],
    "blocks": [(i * LAYER_BYTES, BLOCK) for i in range(NUM_LAYERS)],
    "unaligned": [(4 + i * LAYER_BYTES, BLOCK + 4) for i in range(NUM_LAYERS)],
}


def layout(name: str) -> KVLayout:
    return KVLayout(NUM_BLOCKS, 16, LAYER_BYTES, 8, tuple(LayerLayout(0, *where) for where in LAYOUTS[name]))


class Rank:
    def __init__(self, node: str, name: str) -> None:
        self.layout = layout(name)
        self.memory = torch.zeros(NUM_BLOCKS * (BLOCK + 4) + 4, dtype=torch.uint8, device="cuda")
        space = BlockSpace.of(Fingerprint("model", "bfloat16", 16, NUM_LAYERS, 8, 128), self.layout)
        self.pool = PoolAttachment(
            [node], space, self.layout, {0: self.memory}, staging_bytes=16 * BLOCK, deadline_s=WAIT_S
        )

    def block(self, block_id: int) -> Any:
        starts = [layer.base + block_id * layer.block_stride for layer in self.layout.layers]
        return torch.cat([self.memory[at : at + LAYER_BYTES] for at in starts]).cpu()

    def close(self) -> None:
        self.pool.close()


@pytest.fixture(scope="module")
def node() -> Iterator[str]:
    command = [sys.executable, "-m", "kvferry", "node", "--slab-bytes", str(BLOCK), "--arena-bytes", "512MiB"]
    process = subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith(LISTENING), line
        yield line.removeprefix(LISTENING).strip()
    finally:
        process.terminate()
        process.wait(WAIT_S)
        process.stdout.close()


def eventually(check: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + WAIT_S
    while not check():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(("source", "target"), [("layers", "blocks"), ("blocks", "layers"), ("unaligned", "unaligned")])
def test_blocks_come_back_to_the_bit_staged_and_straight_out_of_the_nodes_memory(
    node: str, source: str, target: str
) -> None:
    here, there = Rank(node, source), Rank(node, target)
    try:
        here.memory.random_(0, 256)
        torch.cuda.synchronize()
        names = [f"{source}{i}".encode().ljust(32) for i in range(40)]
        ids = list(range(7, 127, 3))
        saved = here.pool.save(names, ids).result(WAIT_S)
        assert (saved.stored, saved.cause) == (40, None)
        device: Any = there.pool._device

        def load_all() -> None:
            there.memory.fill_(77)
            torch.cuda.synchronize()
            loaded = there.pool.load(names, list(range(80, 120))).result(WAIT_S)
            assert (loaded.num_blocks, loaded.cause) == (40, None)
            assert all(torch.equal(there.block(80 + i), here.block(ids[i])) for i in range(40))
            assert (there.block(79) == 77).all() and (there.block(120) == 77).all()

        find, device._arenas.find = device._arenas.find, lambda *_: None
        load_all()
        device._arenas.find = find

        def is_pinned() -> bool:
            load_all()
            return any(device._arenas._pinned.values())

        assert eventually(is_pinned), "the node's memory could not be pinned read-only: what does the log say?"
        load_all()
        assert device.staging.num_free == device.staging.num_pieces
    finally:
        here.close()
        there.close()


def test_a_cancelled_load_and_save_end_soon_and_leave_nothing(node: str) -> None:
    rank = Rank(node, "layers")
    try:
        rank.memory.random_(0, 256)
        torch.cuda.synchronize()
        names = [f"c{i}".encode().ljust(32) for i in range(60)]
        save = rank.pool.save(names, list(range(60)))
        save.cancel()
        assert save.result(WAIT_S).cause in ("cancelled", None)
        rank.pool.save(names, list(range(60))).result(WAIT_S)
        load = rank.pool.load(names, list(range(60, 120)))
        load.cancel()
        assert load.result(WAIT_S).cause in ("cancelled", None)
        device: Any = rank.pool._device
        assert device.staging.num_free == device.staging.num_pieces
        assert rank.pool.load(names, list(range(60, 120))).result(WAIT_S).num_blocks == 60
        assert all(torch.equal(rank.block(60 + i), rank.block(i)) for i in range(60))
    finally:
        rank.close()
