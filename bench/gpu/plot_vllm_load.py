"""Draw the output of vllm_load.py: python bench/gpu/plot_vllm_load.py vllm_load.json vllm_load.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def by_system(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["system"], []).append(row)
    return found


def main(arguments: list[str]) -> int:
    run = json.loads(Path(arguments[0]).read_text())
    systems = by_system([row for row in run["rows"] if "error" not in row])
    figure, (goodput, ttft, itl, tpot) = plt.subplots(1, 4, figsize=(18, 4.4))
    for number, (system, rows) in enumerate(systems.items()):
        rates, color = [row["rate"] for row in rows], f"C{number}"
        goodput.plot(rates, [row["goodput_per_s"] for row in rows], marker="o", color=color, label=system)
        for axes, field in ((ttft, "ttft_ms"), (itl, "itl_ms"), (tpot, "tpot_ms")):
            for percent, style in (("p50", "-"), ("p99", "--")):
                values = [row[field][percent] if row[field] else None for row in rows]
                axes.plot(rates, values, style, marker="o", color=color, label=f"{system}, {percent}")
    load = next(iter(systems.values()))[0]["load"]
    goodput.set_title(f"Good: TTFT ≤ {load['ttft_limit_s']:g} s, TPOT ≤ {1000 * load['tpot_limit_s']:g} ms")
    goodput.set_ylabel("good requests a second")
    ttft.set_title("Time to first token")
    itl.set_title("Time between tokens")
    tpot.set_title("Mean time between an answer's tokens")
    ttft.axhline(1000 * load["ttft_limit_s"], color="black", linestyle=":", linewidth=1)
    tpot.axhline(1000 * load["tpot_limit_s"], color="black", linestyle=":", linewidth=1)
    for axes in (ttft, itl, tpot):
        axes.set_yscale("log")
        axes.set_ylabel("ms")
    for axes in (goodput, ttft, itl, tpot):
        axes.set_xlabel("requests a second")
        axes.set_ylim(bottom=0 if axes is goodput else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments[1], dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
