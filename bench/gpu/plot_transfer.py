"""Draw the figures of bench/gpu/transfer.py: python bench/gpu/plot_transfer.py transfer.json out.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SYSTEMS = {
    "kvferry-cuda": "kvferry, the transport",
    "engine": "kvferry, the whole engine",
    "mooncake-nvlink_intra": "Mooncake (nvlink_intra)",
    "nixl-ucx": "NIXL (UCX)",
}
TITLES = {"peer": "From one H200 to another", "device": "Two processes on one H200"}


def found(rows: list[dict[str, Any]], where: str, system: str) -> dict[str, float]:
    """GB/s by block size."""
    section, name = (f"engine, {where}", "kvferry-cuda") if system == "engine" else (where, system)
    mine = [r for r in rows if r["section"] == section and r["system"] == name and "GBps" in r]
    return {r["case"].removesuffix(", guarded"): r["GBps"] for r in mine}


def by_block_size(axes: Any, rows: list[dict[str, Any]], where: str) -> None:
    """Bars: payload GB/s at each block size, beside the contiguous copy as a line."""
    sizes = [16, 64, 256, 2048]
    figures = {name: found(rows, where, name) for name in SYSTEMS}
    systems = [name for name, values in figures.items() if any(f"{size} KiB" in values for size in sizes)]
    for index, system in enumerate(systems):
        heights = [figures[system].get(f"{size} KiB", 0.0) for size in sizes]
        places = [i + (index - (len(systems) - 1) / 2) * 0.84 / len(systems) for i in range(len(sizes))]
        bars = axes.bar(places, heights, 0.84 / len(systems), label=SYSTEMS[system])
        axes.bar_label(bars, [f"{h:.0f}" if h >= 10 else f"{h:.1f}" if h else "" for h in heights], fontsize=7)
    for system, style in (("cudaMemcpy", "--"), ("nccl", ":")):
        values = found(rows, where, system)
        if values:
            name = "one contiguous cudaMemcpy" if system == "cudaMemcpy" else "NCCL send/recv, contiguous"
            axes.axhline(max(values.values()), color="black", linewidth=1, linestyle=style, label=name)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.35)
    axes.set_xticks(range(len(sizes)), [f"{s} KiB" if s < 1024 else f"{s >> 10} MiB" for s in sizes])
    axes.set_xlabel("block size, 1 GiB shuffled")
    axes.set_ylabel("GB/s")
    axes.set_title(TITLES[where])
    axes.legend(fontsize=7, ncols=2, loc="upper center")


def by_programs(axes: Any, rows: list[dict[str, Any]], where: str) -> None:
    """GB/s over the number of programs, and how much slower a model on either side becomes meanwhile."""
    cost = [r for r in rows if r["section"] == f"{where} cost" and "reader_slower" in r]
    counts = [int(r["case"].split(" ")[0]) for r in cost]
    axes.plot(counts, [r["GBps"] for r in cost], marker="o", color="tab:blue", label="GB/s")
    axes.set_ylim(0, None)
    slower = axes.twinx()
    for side, colour in (("reader", "tab:red"), ("owner", "tab:orange")):
        percent = [100 * r[f"{side}_slower"] for r in cost]
        slower.plot(counts, percent, marker="s", linestyle="--", color=colour, label=f"{side}'s model slower by, %")
    slower.set_ylim(min(0, slower.get_ylim()[0]), None)
    slower.set_ylabel("%")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(c) for c in counts])
    axes.set_xlabel("programs (at most one SM each up to 132)")
    axes.set_ylabel("GB/s")
    axes.set_title("64 KiB blocks pulled beside matrix products")
    lines = axes.get_lines() + slower.get_lines()
    axes.legend(lines, [line.get_label() for line in lines], fontsize=7, loc="center left")


def main() -> int:
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    for row in rows:
        row.setdefault("system", "cudaMemcpy" if row["case"].startswith("contiguous copy") else "kvferry-cuda")
    places = [where for where in ("peer", "device") if any(r["section"] == where for r in rows)]
    figure, axes = plt.subplots(len(places), 2, figsize=(12, 4.2 * len(places)), squeeze=False)
    for row, where in zip(axes, places, strict=True):
        by_block_size(row[0], rows, where)
        by_programs(row[1], rows, where)
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
