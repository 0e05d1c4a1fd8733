"""The same through the whole transfer engine: connect by address, guard's word in host memory, `read_sync`."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pair
import torch

from kvferry.transfer import TransferEngine
from kvferry.transport.base import Guard
from kvferry.transport.memory import WordTable


class LoopThread:
    """An asyncio loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Any, seconds: float = 30) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


def _owner(pipe: Connection, device: int, nbytes: int) -> None:
    torch.cuda.set_device(device)
    data = pair.random_words(nbytes, 21, device)
    torch.cuda.synchronize()
    loop, engine = LoopThread(), TransferEngine()
    loop.run(engine.start())
    region = engine.register(data)
    words = WordTable(engine.allocate(4096))
    offset = words.allocate(123456789)
    pipe.send((engine.address, region.region_id, words._region.region_id, offset))
    pipe.recv()
    loop.run(engine.close())
    loop.close()


def run(report: Any, source: int, device: int, ceiling_gbps: float) -> None:
    where = f"engine, {'peer' if source != device else 'device'}"
    here, there = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_owner, args=(there, source, pair.GIB), daemon=True)
    process.start()
    torch.cuda.set_device(device)
    target = torch.zeros(pair.GIB // 4, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize()
    loop, engine = LoopThread(), TransferEngine()
    loop.run(engine.start())
    try:
        region = engine.register(target)
        if not here.poll(90):
            raise TimeoutError("the owner was silent for 90 s")
        address, region_id, words_id, offset = here.recv()
        peer = loop.run(engine.connect(address, deadline_s=10.0))
        guard = Guard(words_id, offset, 123456789)
        truth = pair.random_words(pair.GIB, 21, device)
        for kib in (16, 64, 2048):
            blocks = pair.shuffled(peer.regions[region_id], region, pair.GIB, kib << 10, 6)
            seconds = pair.median_s(
                lambda blocks=blocks: engine.read_sync(peer, blocks, guard=guard, deadline_s=10.0), 5, 2
            )
            words = kib << 8
            rows = [torch.from_numpy(o // (kib << 10)).to(target.device) for o in blocks[2:4]]
            good = torch.equal(target.view(-1, words)[rows[1]], truth.view(-1, words)[rows[0]])
            gbps = pair.GIB / seconds / 1e9
            report.add(
                where, f"{kib} KiB, guarded", GBps=gbps, ratio_to_ceiling=gbps / ceiling_gbps if ceiling_gbps else None,
                verified=good, bytes=pair.GIB,
            )  # fmt: skip
        blocks = pair.shuffled(peer.regions[region_id], region, 1 << 20, 65536, 6)
        for name, given in (("1 MiB (16 x 64 KiB)", None), ("1 MiB (16 x 64 KiB), guarded", guard)):
            times, used = [], ""
            for _ in range(1000):
                started = time.perf_counter()
                used = engine.read_sync(peer, blocks, guard=given, deadline_s=1.0).transport
                times.append(time.perf_counter() - started)
            us = np.sort(np.array(times[200:])) * 1e6
            report.add(
                where, name, p50_us=float(us[len(us) // 2]), p99_us=float(us[int(len(us) * 0.99)]), bytes=1 << 20,
                transport=used, verified=used == "cuda",
            )  # fmt: skip
        report.add(where, "choice", explain=[list(choice) for choice in engine.explain(peer)])
    finally:
        loop.run(engine.close())
        loop.close()
        here.send("stop")
        process.join(10)
