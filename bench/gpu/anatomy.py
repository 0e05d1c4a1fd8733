"""Where the time of one large read goes: until the first launch, between the launches, behind the last one.

A section of transfer.py. Begins and ends of kernels are CUDA events around each launch; the wall time is `Link.read`'s.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch


def run(bench: Any) -> None:
    copier = bench.transport.copier(bench.device)
    plain = copier._launch
    marks: list[tuple[float, torch.cuda.Event, torch.cuda.Event, int]] = []

    def marked(lane: Any, half: int, run: Any, first: int, last: int, *rest: Any) -> None:
        stream = torch.cuda.ExternalStream(lane.streams[half], device=bench.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        plain(lane, half, run, first, last, *rest)
        end.record(stream)
        marks.append((time.perf_counter(), begin, end, last - first))

    for kib in (16, 64, 256, 2048):
        blocks = bench.blocks(kib)
        rows: list[dict[str, float]] = []
        shape: list[int] = []
        copier._launch = marked
        try:
            for _ in range(9):
                marks.clear()
                torch.cuda.synchronize()
                zero = torch.cuda.Event(enable_timing=True)
                zero.record(torch.cuda.Stream())
                began_s = time.perf_counter()
                bench.read([blocks])
                wall = time.perf_counter() - began_s
                first = zero.elapsed_time(marks[0][1])
                ends = [zero.elapsed_time(end) for _, _, end, _ in marks]
                gaps = [marks[i + 1][1].elapsed_time(marks[i][2]) for i in range(len(marks) - 1)]
                shape = [n for *_, n in marks]
                rows.append(
                    {
                        "wall_us": wall * 1e6,
                        "launched_us": (marks[0][0] - began_s) * 1e6,
                        "first_begins_us": first * 1e3,
                        "span_us": (max(ends) - first) * 1e3,
                        "overlap_us": sum(gaps) * 1e3,
                        "last_launched_us": (marks[-1][0] - began_s) * 1e6,
                    }
                )
        finally:
            copier._launch = plain
        figures = {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]}
        bench.report.add(f"{bench.where} anatomy", f"{kib} KiB", launches=shape, **figures)
