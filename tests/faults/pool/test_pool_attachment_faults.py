"""A node that is killed or stopped while an engine loads and saves: a cause, in time, and never a wrong byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvferry.layout import Fingerprint, KVLayout, LayerLayout
from kvferry.observe import LISTENING
from kvferry.pool import BlockSpace, PoolAttachment
from pool_processes import WAIT_S, fixed_port

LAYER_BYTES, NUM_LAYERS, NUM_BLOCKS = 16384, 4, 48

FINGERPRINT = Fingerprint("model", "float32", 16, NUM_LAYERS, 2, 8)
LAYERS = tuple(LayerLayout(i % 2, (i // 2) * LAYER_BYTES, 2 * LAYER_BYTES) for i in range(NUM_LAYERS))
LAYOUT = KVLayout(NUM_BLOCKS, 16, LAYER_BYTES, 2, LAYERS)
SPACE = BlockSpace.of(FINGERPRINT, LAYOUT)


class Node:
    """`kvferry node` as a process."""

    def __init__(self, port: int = 0) -> None:
        flags = ["--arena-bytes", "4MiB", "--slab-bytes", "64KiB", "--log-level", "error"]
        self.port = port or fixed_port()
        flags += ["--listen", f"tcp://127.0.0.1:{self.port}"]
        command = [sys.executable, "-m", "kvferry", "node", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().removeprefix(LISTENING).strip()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Rank:
    def __init__(self, address: str, **settings: Any) -> None:
        self.memory = {i: np.zeros(NUM_BLOCKS * 2 * LAYER_BYTES, dtype=np.uint8) for i in range(2)}
        self.pool = PoolAttachment([address], SPACE, LAYOUT, self.memory, deadline_s=WAIT_S, **settings)

    def cells(self, block_id: int) -> list[np.ndarray]:
        starts = [(layer.region, layer.base + block_id * layer.block_stride) for layer in LAYERS]
        return [self.memory[region][at : at + LAYER_BYTES] for region, at in starts]

    def fill(self, numbers: list[int]) -> list[bytes]:
        for block_id, number in enumerate(numbers):
            for layer, cell in enumerate(self.cells(block_id)):
                cell[:] = content(number, layer)
        return names(numbers)


def content(number: int, layer: int) -> np.ndarray:
    return np.random.default_rng([number, layer]).integers(0, 256, LAYER_BYTES, dtype=np.uint8)


def names(numbers: list[int]) -> list[bytes]:
    return [number.to_bytes(8, "big") for number in numbers]


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.kill()


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
def test_a_node_killed_while_it_was_to_load_or_save(node: Node, transports: tuple[str, ...]) -> None:
    rank = Rank(node.address, transports=transports)
    try:
        hashes = rank.fill(list(range(8)))
        assert rank.pool.save(hashes, range(8)).result(WAIT_S).stored == 8
        node.stop()
        load = rank.pool.load(hashes, range(20, 28))
        save = rank.pool.save(names(list(range(8, 12))), range(8, 12))
        look = rank.pool.lookup(hashes)
        assert not load.done()
        node.kill()
        assert (load.result(WAIT_S).num_blocks, load.result().cause) == (0, "peer_gone")
        assert (save.result(WAIT_S).stored, save.result().refused, save.result().cause) == (0, 4, "peer_gone")
        assert look.result(WAIT_S) == 0
        again = Node(node.port)
        try:
            until_s = time.monotonic() + WAIT_S
            while rank.pool.save(hashes, range(8)).result(WAIT_S).stored < 8 and time.monotonic() < until_s:
                time.sleep(0.02)
            loaded = rank.pool.load(hashes, range(20, 28)).result(WAIT_S)
            assert loaded.num_blocks == 8
            for number in range(8):
                assert all((c == content(number, i)).all() for i, c in enumerate(rank.cells(20 + number)))
        finally:
            again.kill()
    finally:
        rank.pool.close()


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
def test_kill_9_while_loads_and_saves_run(node: Node, transports: tuple[str, ...]) -> None:
    rank = Rank(node.address, transports=transports)
    rng = np.random.default_rng(5)
    num_loaded = num_failed = 0
    try:
        for turn in range(400):
            first = int(rng.integers(0, 40))
            numbers = list(range(first, first + 12))
            save = rank.pool.save(rank.fill(numbers), range(12))
            load = rank.pool.load(names(numbers), range(24, 36))
            loaded, saved = load.result(WAIT_S), save.result(WAIT_S)
            for row in range(loaded.num_blocks):
                cells = rank.cells(24 + row)
                assert all((c == content(numbers[row], i)).all() for i, c in enumerate(cells)), "another block's bytes"
            num_loaded += loaded.num_blocks
            num_failed += (loaded.cause is not None) + (saved.cause is not None)
            if turn == 40:
                node.process.send_signal(signal.SIGKILL)
            if num_failed > 2:
                break
        assert num_loaded > 50
        assert num_failed > 2
        assert rank.pool.stats().saving_bytes == 0
    finally:
        rank.pool.close()


def test_a_stopped_node_ends_everything_by_its_deadline_and_closing_does_not_hang(node: Node) -> None:
    rank = Rank(node.address)
    try:
        hashes = rank.fill(list(range(4)))
        assert rank.pool.save(hashes, range(4)).result(WAIT_S).stored == 4
        rank.pool._deadline_s, rank.pool._nodes.home.deadline_s = 0.5, 0.45
        node.stop()
        load, save = rank.pool.load(hashes, range(8, 12)), rank.pool.save(names([90]), [20])
        assert load.result(WAIT_S).cause == "transfer_timeout"
        assert save.result(WAIT_S).cause in ("transfer_timeout", "transport_error")
    finally:
        rank.pool.close()
