"""Draw bench/results/vllm_pd.json: python bench/gpu/plot_vllm_pd.py vllm_pd.json vllm_pd.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TARGETS = {1000: 1.30, 8000: 1.06, 30000: 1.03}


def ratios(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Bars: time to first token over one instance's, by prompt length; the goals as lines."""
    series: dict[str, dict[int, float]] = {}
    for run in runs:
        kind = "decode graphs" if run["graphs"] else "eager"
        for row in run["rows"]:
            if row["section"] != "ttft":
                continue
            series.setdefault(f"{row['system']}, {kind}", {})[row["prompt"]] = row["ttft_ratio"]
            if row["system"] == "kvferry":
                name = f"kvferry, {kind}, source's token at once"
                series.setdefault(name, {})[row["prompt"]] = row["first_token_streamed_ratio"]
    prompts = sorted(TARGETS)
    width = 0.84 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [i + (index - (len(series) - 1) / 2) * width for i in range(len(prompts))]
        bars = axes.bar(places, [values[p] for p in prompts], width, label=name)
        axes.bar_label(bars, [f"{values[p]:.2f}" for p in prompts], fontsize=7, padding=2)
    for i, prompt in enumerate(prompts):
        axes.hlines(TARGETS[prompt], i - 0.45, i + 0.45, color="black", linestyle="--", linewidth=1, zorder=0)
    axes.set_yscale("log")
    axes.set_ylim(0.9, 40)
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xticks(range(len(prompts)), [f"{p:,} tokens" for p in prompts])
    axes.set_ylabel("time to first token / one instance's")
    axes.set_title("Pair over one instance, all on one H200 (dashed: goal)")
    axes.legend(fontsize=7, loc="upper center", ncols=2)


def timeline(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Stacked bars: what follows the source's last kernel, in ms."""
    rows = [row for run in runs for row in run["rows"] if row["section"] == "timeline"]
    spans = [name for name in rows[0]["ms"] if not name.startswith("source")]
    bottoms = [0.0] * len(rows)
    for name in spans:
        heights = [row["ms"][name] for row in rows]
        bars = axes.bar([f"{row['prompt']:,} tokens" for row in rows], heights, 0.5, bottom=bottoms, label=name)
        axes.bar_label(bars, [f"{h:.1f}" for h in heights], label_type="center", fontsize=8, color="white")
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axes.set_ylim(0, max(bottoms) * 1.4)
    axes.set_ylabel("ms")
    axes.set_title("After the source's last kernel (decode graphs)")
    axes.legend(fontsize=8, loc="upper center")


def main(arguments: list[str]) -> int:
    runs = json.loads(Path(arguments[0]).read_text())["runs"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(2, 1))
    ratios(left, runs)
    timeline(right, runs)
    figure.tight_layout()
    figure.savefig(arguments[1], dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
