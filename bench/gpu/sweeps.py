"""Programs and tiles against bandwidth, what copying costs a model, what digests cost: for choosing defaults."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pair
import torch

from kvferry.transport import cuda_runtime as cuda
from kvferry.transport.base import BlockList, StopToken
from kvferry.transport.checksum import COPY, COPY_AND_SUM, SUM, sums_of_blocks
from kvferry.transport.copying import Limits
from kvferry.transport.cuda_copy import Run
from kvferry.transport.cuda_kernels import Launcher, Tile

GIB = pair.GIB


def grids(bench: Any) -> None:
    """Programs (SMs) and tiles against bandwidth, 64 KiB blocks, through `BlockCopier.copy`."""
    tiles = (Tile(1, 4096, 8), Tile(1, 8192, 16), Tile(1, 16384, 16), Tile(1, 16384, 8))
    counts = (4, 8, 12, 16, 24, 32, 64, 132) if bench.where == "peer" else (32, 132, 264, 528, 2112, 16384)
    blocks = bench.blocks(64)
    for tile in tiles:
        for programs in counts:
            gbps = GIB / with_grid(bench, programs, tile, blocks) / 1e9
            name = f"{programs} programs, {tile.cols * 4 >> 10} KiB x {tile.warps} warps"
            bench.report.add(f"{bench.where} grid", name, GBps=gbps, programs=programs, tile=list(tile))


def with_grid(bench: Any, programs: int, tile: Tile | None, blocks: BlockList, rounds: int = 5) -> float:
    copier = bench.transport.copier(bench.device)
    before, copier.programs = copier.programs, dict.fromkeys(("device", "peer", "host"), programs)
    run, limits = run_of(bench, blocks), Limits(StopToken(), 60.0, "owner")
    try:
        return pair.median_s(lambda: copier.copy([run], limits, tile=tile), rounds, 3)
    finally:
        copier.programs = before


def run_of(bench: Any, blocks: BlockList) -> Run:
    remote = bench.link._remote(bench.owner.region, bench.device)
    return Run(
        blocks.source_offsets,
        remote.address,
        blocks.target_offsets,
        bench.region.address,
        blocks.nbytes,
        remote.path,
    )


def kernels(bench: Any) -> None:
    """The kernel alone, its table on the device, by CUDA events: what the transport's own work comes on top of."""
    with cuda.use(bench.device):
        launcher, stream = Launcher(), torch.cuda.Stream()
        for kib, tiles in (
            (64, [(1, 2048, 4), (1, 4096, 4), (1, 4096, 8), (1, 8192, 8), (1, 8192, 16), (1, 16384, 16)]),
            (16, [(1, 4096, 8), (4, 4096, 16), (2, 4096, 8), (2, 4096, 16)]),
        ):
            at, n = table_of(bench, bench.blocks(kib))
            counts = (16, 32, 132) if bench.where == "peer" else (132, 264, 528, 1056, 4224, 1 << 20)
            for tile in tiles:
                for programs in counts:
                    times = []
                    for _ in range(7):
                        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        begin.record(stream)
                        launcher.copy(
                            at.data_ptr(), n, kib << 10, aligned=True, programs=programs,
                            stream=stream.cuda_stream, tile=Tile(*tile),
                        )  # fmt: skip
                        end.record(stream)
                        end.synchronize()
                        times.append(begin.elapsed_time(end))
                    gbps = GIB / statistics.median(times[2:]) / 1e6
                    name = f"{kib} KiB, {programs} programs, tile {'x'.join(map(str, tile))}"
                    bench.report.add(f"{bench.where} kernel grid", name, GBps=gbps, programs=programs, tile=list(tile))
        # What one launch costs the CPU: no waiting, a table of one block.
        event = cuda.new_event()
        one, _ = table_of(bench, bench.blocks(64, 65536))
        for name, work in (
            ("launch", lambda: launcher.copy(
                one.data_ptr(), 1, 65536, aligned=True, programs=4, stream=stream.cuda_stream)),
            ("record", lambda: cuda.record(event, stream.cuda_stream)),
            ("enter", lambda: cuda.leave(cuda.enter(bench.device), bench.device)),
            ("query", lambda: cuda.is_done(event)),
        ):  # fmt: skip
            work()
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(200):
                work()
            spent = time.perf_counter() - started
            torch.cuda.synchronize()
            bench.report.add(f"{bench.where} cpu", name, p50_us=spent / 200 * 1e6)


def table_of(bench: Any, blocks: BlockList) -> tuple[torch.Tensor, int]:
    run = run_of(bench, blocks)
    table = np.concatenate([run.source_offsets + run.source_base, run.target_offsets + run.target_base])
    return torch.from_numpy(table).to(bench.buffer.device), len(run.source_offsets)


def cost(bench: Any) -> None:
    """What copying costs matrix products on the reader's GPU, and on the owner's."""
    multiply = pair.products(bench.device)
    alone = pair.median_s(multiply, 5)
    owner_alone = bench.owner.ask("products", 7)
    bench.report.add(f"{bench.where} cost", "alone", reader_ms=alone * 1e3, owner_ms=owner_alone * 1e3)
    blocks = bench.blocks(64)
    copier = bench.transport.copier(bench.device)
    for programs in (8, 16, 24, 32, 64, 132) if bench.where == "peer" else (32, 132, 264, 528):
        before, copier.programs = copier.programs, dict.fromkeys(("device", "peer", "host"), programs)
        rates: list[float] = []
        puller = threading.Thread(target=lambda rates=rates: rates.append(pair.rate(bench.link, blocks, 1.2)))
        puller.start()
        time.sleep(0.1)
        reader = median_on_own_stream(multiply, 9)
        owner = bench.owner.ask("products", 9)
        puller.join()
        copier.programs = before
        bench.report.add(
            f"{bench.where} cost",
            f"{programs} programs",
            GBps=rates[0] / 1e9,
            reader_ms=reader * 1e3,
            reader_slower=reader / alone - 1,
            owner_ms=owner * 1e3,
            owner_slower=owner / owner_alone - 1,
        )


def digests(bench: Any) -> None:
    """The checksum fused into the copy: right, and its price."""
    with cuda.use(bench.device):
        launcher, stream = Launcher(), torch.cuda.Stream()
        blocks = bench.blocks(64)
        at, n = table_of(bench, blocks)
        sums = torch.zeros(n, dtype=torch.int64, device=bench.buffer.device)
        grid = bench.transport.settings.programs_peer if bench.where == "peer" else 528

        def launch(mode: int) -> None:
            launcher.copy(
                at.data_ptr(), n, 65536, aligned=True, programs=grid, stream=stream.cuda_stream,
                mode=mode, sums=sums.data_ptr() if mode else 0,
            )  # fmt: skip
            stream.synchronize()

        launch(COPY_AND_SUM)
        first = bench.truth.view(n, -1)[torch.from_numpy(blocks.source_offsets[:64] // 65536).to(bench.buffer.device)]
        memory = first.cpu().numpy().view(np.uint8).reshape(-1)
        good = sums[:64].tolist() == sums_of_blocks(memory, np.arange(64) * 65536, 65536).tolist()
        for name, work in (
            ("copy alone", lambda: launch(COPY)),
            ("copy and digest", lambda: launch(COPY_AND_SUM)),
            ("digest alone", lambda: launch(SUM)),
        ):
            bench.report.add(f"{bench.where} digest", name, GBps=GIB / pair.median_s(work, 5) / 1e9, verified=good)


def median_on_own_stream(work: Callable[[], None], rounds: int) -> float:
    """Wall time of `work` on a stream of its own; what runs beside it on others is not waited for."""
    stream, times = torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        for _ in range(rounds):
            started = time.perf_counter()
            work()
            stream.synchronize()
            times.append(time.perf_counter() - started)
    return statistics.median(times)
