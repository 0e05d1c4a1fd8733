"""kvferry's cuda transport on one or two GPUs: first whether it is right, then how fast it is. Writes JSON.

    COMMIT=$(git rev-parse HEAD) PYTHONPATH=src python3 bench/gpu/transfer.py --out transfer.json

With two GPUs the owner is on GPU 0 and the reader on GPU 1, then both share GPU 0; with one, only the latter. Every
figure of kvferry is wall time of `Link.read` or of `TransferEngine.read_sync` (sections `engine, ...`), tables and
waiting included, medians; every case's blocks are compared, all of them. Then the other systems that are installed.
Rows: section, system, case, and GBps (payload) or p50_us/p99_us; bytes, verified, and ratio_to_ceiling, where the
ceiling is one cudaMemcpy of 1 GiB in this run. The file is written anew after each section.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anatomy
import checks
import numpy as np
import pair
import peers
import sweeps
import through_engine
import torch
import triton

from kvferry.layout import HeadGrid, KVLayout, LayerLayout, plan_copy
from kvferry.transport import cuda_runtime as cuda
from kvferry.transport.base import BlockList, Guard, StopToken
from kvferry.transport.cuda import CudaSettings

GIB = pair.GIB
SIZES_KIB = (16, 64, 256, 2048)


class Report:
    """Collects rows; prints each as it comes."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}
        self._out, self._started, self._seconds = out, time.perf_counter(), seconds

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def save(self) -> None:
        whole = self.about | {"seconds": round(self.elapsed_s(), 1), "rows": self.rows}
        self._out.write_text(json.dumps(whole, indent=1) + "\n")

    def add(self, section: str, case: str, system: str = "kvferry-cuda", **values: Any) -> None:
        row = {"section": section, "system": system, "case": case}
        row |= {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Run one section; a failure is a row, and the others still run."""
        begun = time.perf_counter()
        if self.elapsed_s() > self._seconds:
            self.add(name, "", skipped=f"not begun: {self._seconds:.0f} s had passed")
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 (whatever fails, the other sections' figures are wanted)
            traceback.print_exc()
            self.add(name, "failed", error=repr(error)[:300])
        print(f"-- {name}: {time.perf_counter() - begun:.1f} s, {self.elapsed_s():.1f} s in all", flush=True)
        self.save()


class Bench:
    """A reader on one device and an owner process on the same or another one."""

    def __init__(self, report: Report, owner_device: int, reader_device: int) -> None:
        self.report = report
        self.where = "peer" if owner_device != reader_device else "device"
        self.device = reader_device
        torch.cuda.set_device(reader_device)
        self.owner = pair.Owner(owner_device, GIB)
        self.transport, self.incarnation = pair.new_transport()
        self.buffer = torch.zeros(GIB // 4, dtype=torch.int32, device=f"cuda:{reader_device}")
        self.region = pair.region_of(self.buffer, 2, writable=True)
        pair.exported(self.transport, self.region)
        self.link = self.owner.connect(self.transport)
        self.link.regions = {1: self.owner.region}
        self.truth = self.owner.data(reader_device)
        self.ceiling_gbps = 0.0

    def close(self) -> None:
        self.link.close()
        self.owner.stop()
        self.transport.close()

    def blocks(self, kib: int, nbytes: int = GIB, seed: int = 3) -> BlockList:
        return pair.shuffled(self.owner.region, self.region, nbytes, kib << 10, seed)

    def read(self, blocks: list[BlockList], guard: Guard | None = None) -> None:
        self.link.read(blocks, guard=guard, stop=StopToken(), deadline_s=10.0)

    def arrived(self, blocks: BlockList) -> bool:
        words = blocks.nbytes // 4
        rows = [torch.from_numpy(o // blocks.nbytes).to(self.buffer.device) for o in blocks[2:4]]
        got = self.buffer.view(-1, words).index_select(0, rows[1])
        return torch.equal(got, self.truth.view(-1, words).index_select(0, rows[0]))

    def paged(self) -> None:
        """1 GiB in shuffled blocks, beside one contiguous copy of 1 GiB in the same rounds."""
        lists = {kib: self.blocks(kib) for kib in SIZES_KIB}
        whole = self.contiguous()
        times: dict[int, list[float]] = {kib: [] for kib in (0, *SIZES_KIB)}
        good = {}
        for kib, blocks in lists.items():
            self.buffer.zero_()
            torch.cuda.synchronize()
            self.read([blocks])
            good[kib] = self.arrived(blocks)
        for _ in range(9):
            times[0].append(pair.median_s(whole, 1, 1))
            for kib, blocks in lists.items():
                times[kib].append(pair.median_s(lambda blocks=blocks: self.read([blocks]), 1, 1))
        self.ceiling_gbps = GIB / statistics.median(times[0]) / 1e9
        self.report.add(self.where, "contiguous copy 1 GiB", "cudaMemcpy", GBps=self.ceiling_gbps, bytes=GIB)
        for kib in SIZES_KIB:
            gbps = GIB / statistics.median(times[kib]) / 1e9
            self.report.add(
                self.where, f"{kib} KiB", GBps=gbps, ratio_to_ceiling=gbps / self.ceiling_gbps, verified=good[kib],
                bytes=GIB, rounds_GBps=[round(GIB / s / 1e9, 1) for s in times[kib]],
            )  # fmt: skip

    def contiguous(self) -> Callable[[], None]:
        """One cudaMemcpy of 1 GiB out of the owner's memory into the reader's."""
        handle = self.owner.region.handles["cuda"]
        base = self.link._opened[self.device, bytes(handle["handle"])] if self.link._opened else 0
        if not base:
            self.read([self.blocks(2048, 1 << 21)])
            base = self.link._opened[self.device, bytes(handle["handle"])]
        source, stream = base + handle["offset"], torch.cuda.Stream()

        def copy() -> None:
            kind = cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            cuda.call(cuda.runtime.cudaMemcpyAsync, self.buffer.data_ptr(), source, GIB, kind, stream.cuda_stream)
            stream.synchronize()

        return copy

    def latency(self) -> None:
        """Small batches: the call of `Link.read` to its return."""
        self.owner.ask("word", 0, 77)
        guard = Guard(1, GIB, 77)
        cases = {
            "1 MiB (16 x 64 KiB)": ([self.blocks(64, 1 << 20)], None),
            "1 MiB (16 x 64 KiB), guarded": ([self.blocks(64, 1 << 20)], guard),
            "4 KiB": ([self.blocks(4, 4096)], None),
            "64 layers x 16 x 4 KiB, guarded": ([self.layer(index) for index in range(64)], guard),
        }
        for name, (blocks, guarded) in cases.items():
            times = []
            for _ in range(1500):
                started = time.perf_counter()
                self.link.read(blocks, guard=guarded, stop=StopToken(), deadline_s=1.0)
                times.append(time.perf_counter() - started)
            us = np.sort(np.array(times[300:])) * 1e6
            p50, p99 = float(us[len(us) // 2]), float(us[int(len(us) * 0.99)])
            nbytes = sum(part.total_bytes for part in blocks)
            self.report.add(
                f"{self.where} latency", name, p50_us=p50, p99_us=p99, bytes=nbytes,
                verified=all(self.arrived(part) for part in blocks),
            )  # fmt: skip
        times = []
        for _ in range(500):
            started = time.perf_counter()
            self.link.load_word(self.owner.region, GIB, deadline_s=1.0)
            times.append(time.perf_counter() - started)
        self.report.add(f"{self.where} latency", "load_word", p50_us=statistics.median(times) * 1e6)

    def layer(self, index: int) -> BlockList:
        """16 blocks of 4 KiB, apart from those of the other layers."""
        blocks, at = self.blocks(4, 65536, index), index * 65536
        return blocks._replace(source_offsets=blocks.source_offsets + at, target_offsets=blocks.target_offsets + at)

    def host(self) -> None:
        """Device to pinned host memory and back, 64 KiB blocks shuffled, beside one cudaMemcpy of the same bytes."""
        pinned = torch.empty(GIB // 4, dtype=torch.int32, pin_memory=True)
        host = pair.region_of(pinned, 3)
        for way, source, target in (("to host", self.region, host), ("from host", host, self.region)):
            blocks = pair.shuffled(source, target, GIB, 65536, 9)
            from_, to = source.buffer, target.buffer
            from_.copy_(self.truth)
            to.zero_()
            torch.cuda.synchronize()
            ceiling = GIB / pair.median_s(lambda to=to, from_=from_: to.copy_(from_, non_blocking=True), 5) / 1e9
            for programs in (4, 8, 16, 32, 64):
                self.transport.copier(self.device).programs["host"] = programs
                gbps = (
                    GIB
                    / pair.median_s(
                        lambda blocks=blocks: self.transport.copy([blocks], stop=StopToken(), deadline_s=10.0), 3, 1
                    )
                    / 1e9
                )
                self.report.add(
                    "host",
                    f"{way}, 64 KiB, {programs} programs",
                    GBps=gbps,
                    ratio_to_ceiling=gbps / ceiling,
                    ceiling_GBps=ceiling,
                )
            rows = [torch.from_numpy(o // 65536) for o in blocks[2:4]]
            got = to.view(-1, 16384)[rows[1].to(to.device)].cpu()
            wanted = from_.view(-1, 16384)[rows[0].to(from_.device)].cpu()
            self.report.add("host", f"{way}, every block", verified=torch.equal(got, wanted))
        self.transport.copier(self.device).programs["host"] = CudaSettings().programs_host

    def layouts(self) -> None:
        """Blocks of 16 tokens, 8 KV heads of 128 bf16 (64 KiB), 4,096 of them: orders and tensor-parallel slices."""
        vector, tokens, count = 256, 16, 4096

        def layout(order: str, num_heads: int, rank: int, size: int) -> KVLayout:
            part = num_heads * tokens * vector
            strides = (tokens * vector, vector) if order == "HND" else (vector, num_heads * vector)
            grid = HeadGrid((0, part), *strides, vector)
            layer = LayerLayout(1, 0, 2 * part)
            return KVLayout(count, tokens, 2 * part, num_heads, (layer,), grid, "", rank, size)

        ids = np.random.default_rng(4).permutation(count)
        for name, source, target in (
            ("NHD to NHD, whole", layout("NHD", 8, 0, 1), layout("NHD", 8, 0, 1)),
            ("HND to HND, half of the heads (TP 1 to 2)", layout("HND", 8, 0, 1), layout("HND", 4, 1, 2)),
            ("NHD to NHD, half of the heads (TP 1 to 2)", layout("NHD", 8, 0, 1), layout("NHD", 4, 1, 2)),
            ("NHD to HND", layout("NHD", 8, 0, 1), layout("HND", 8, 0, 1)),
        ):
            started = time.perf_counter()
            copies = plan_copy(source, target, range(1), ids, np.arange(count))
            planned = time.perf_counter() - started
            blocks = [
                BlockList(self.owner.region, self.region, c.source_offsets, c.target_offsets, c.nbytes) for c in copies
            ]
            self.buffer.zero_()
            seconds = pair.median_s(lambda blocks=blocks: self.read(blocks), 5, 2)
            moved = sum(b.total_bytes for b in blocks)
            self.report.add(
                f"{self.where} layouts",
                name,
                GBps=moved / seconds / 1e9,
                ratio_to_ceiling=moved / seconds / 1e9 / self.ceiling_gbps if self.ceiling_gbps else None,
                run_bytes=blocks[0].nbytes,
                plan_ms=planned * 1e3,
                verified=self.rearranged(source, target, ids),
            )

    def rearranged(self, source: KVLayout, target: KVLayout, ids: np.ndarray) -> bool:
        def cells(memory: torch.Tensor, layout: KVLayout, which: torch.Tensor) -> torch.Tensor:
            """[blocks, parts, heads, tokens, words], whatever the order in memory."""
            words, n = layout.block_bytes // 4, layout.num_kv_heads
            blocks = memory[: layout.num_blocks * words].view(layout.num_blocks, words)[which]
            assert layout.grid is not None
            if layout.grid.token_stride == 256:
                return blocks.view(-1, 2, n, 16, 64)
            return blocks.view(-1, 2, 16, n, 64).transpose(2, 3)

        on = self.buffer.device
        wanted = cells(self.truth, source, torch.from_numpy(ids).to(on))
        first = target.tp_rank * target.num_kv_heads
        got = cells(self.buffer, target, torch.arange(len(ids), device=on))
        return torch.equal(got, wanted[:, :, first : first + target.num_kv_heads])

    def both_ways(self) -> None:
        """Each side pulls 64 KiB blocks from the other at once."""
        encoded = checks.encoded(pair.exported(self.transport, self.region))
        self.owner.ask("pull", self.transport.offer(), self.incarnation, encoded, 65536, 1.5)
        here = pair.rate(self.link, self.blocks(64), 1.5)
        there = self.owner._receive(30)
        self.report.add(f"{self.where} both ways", "64 KiB", reader_GBps=here / 1e9, owner_GBps=there / 1e9)


def summary(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'section':18} {'case':46} {'figure':>22} {'ratio':>7} ok")
    for row in rows:
        if "grid" in row["section"]:
            continue
        figure = ", ".join(f"{k} {row[k]}" for k in ("GBps", "p50_us", "p99_us", "error", "skipped") if k in row)
        name = row["case"] if row["system"] == "kvferry-cuda" else f"{row['system']}: {row['case']}"
        print(f"{row['section']:18} {name[:46]:46} {figure[:60]:>22} {row.get('ratio_to_ceiling', '')!s:>7} "
              f"{row.get('verified', '')}")  # fmt: skip


def measure_peer(report: Report, where: str, peer: str, source: int, device: int, ceiling_gbps: float) -> None:
    """One other system's rows."""
    for row in peers.measure(peer, source, device, seconds=25):
        gbps = row.get("GBps")
        if gbps and ceiling_gbps:
            row["ratio_to_ceiling"] = gbps / ceiling_gbps
        report.add(where, row.pop("case", ""), peers.NAMES[peer], **row)


def _head() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return found if len(found) == 40 else "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--peers", default="nccl,nixl,mooncake")
    ask.add_argument("--seconds", type=float, default=120, help="no section begins later (default 120)")
    ask.add_argument(
        "--only", help="checks,paged,anatomy,latency,layouts,digests,both_ways,cost,engine,grids,kernels,host,faults"
    )
    args = ask.parse_args()
    report = Report(args.out, args.seconds)
    wanted = args.only.split(",") if args.only else None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report.about = {
        "commit": os.environ.get("COMMIT") or _head(),
        "machine": {"gpus": gpus, "processor": _processor(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "command": " ".join(["python3", *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    print(json.dumps(report.about), flush=True)
    pairs = [(0, 1), (0, 0)] if len(gpus) > 1 else [(0, 0)]
    ceilings: dict[tuple[int, int], float] = {}
    for source, device in pairs:
        bench: Bench | None = None
        try:
            bench = Bench(report, source, device)
            through = partial(through_engine.run, report, bench.owner.device, bench.device)
            sections = {
                "checks": partial(checks.run, bench),
                "paged": bench.paged,
                "anatomy": partial(anatomy.run, bench),
                "latency": bench.latency,
                "engine": lambda bench=bench, through=through: through(bench.ceiling_gbps),
                "layouts": bench.layouts,
                "host": bench.host,
                "both_ways": bench.both_ways,
                "digests": partial(sweeps.digests, bench),
                "cost": partial(sweeps.cost, bench),
                "grids": partial(sweeps.grids, bench),
                "kernels": partial(sweeps.kernels, bench),
            }
            if (source, device) != pairs[0]:
                for name in ("host", "both_ways"):
                    sections.pop(name)
            for name, work in sections.items():
                if wanted is None or name in wanted:
                    report.attempt(f"{bench.where} {name}", work)
        except Exception as error:  # noqa: BLE001 (the other pair is still wanted)
            traceback.print_exc()
            report.add(f"{source} to {device}", "failed", error=repr(error)[:300])
        finally:
            if bench is not None:
                bench.close()
            torch.cuda.empty_cache()
        ceilings[source, device] = bench.ceiling_gbps if bench is not None else 0.0
    for source, device in pairs:
        where = "peer" if source != device else "device"
        for peer in [p for p in args.peers.split(",") if p]:
            ceiling = ceilings[source, device]
            report.attempt(f"{where} {peer}", partial(measure_peer, report, where, peer, source, device, ceiling))
    if wanted is None or "faults" in wanted:
        report.attempt("faults", partial(checks.faults_apart, report, *pairs[0]))
    report.save()
    summary(report.rows)
    print(f"{report.elapsed_s():.0f} s; {args.out}")
    bad = [r for r in report.rows if r.get("verified") is False or "error" in r]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
