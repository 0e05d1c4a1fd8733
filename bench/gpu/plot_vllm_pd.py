"""Draw runs of vllm_pd.py --trace, one below the other: python bench/gpu/plot_vllm_pd.py vllm_pd.png RUN.json ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GOALS = {1: {1000: 1.30, 8000: 1.06, 30000: 1.03}, 2: {1000: 1.25, 8000: 1.05, 30000: 1.02}}
STREAMED_GOALS = {1000: 1.10, 8000: 1.03, 30000: 1.02}


def place(run: dict[str, Any]) -> str:
    gpus = run.get("gpus")
    name = gpus[0].removeprefix("NVIDIA ") if gpus else "CPU"
    return f"{run['num_gpus']} x {name}{', decode graphs' if run['graphs'] else ''}"


def ratios(axes: Any, run: dict[str, Any]) -> None:
    """Bars: time to first token over one instance's, by prompt length; the goals as lines."""
    series: dict[str, dict[int, float]] = {}
    for row in run["rows"]:
        if row["section"] == "ttft":
            series.setdefault(row["system"], {})[row["prompt"]] = row["ttft_ratio"]
            if row["system"] == "kvferry":
                streamed = series.setdefault("kvferry, source's token at once", {})
                streamed[row["prompt"]] = row["first_token_streamed_ratio"]
    prompts = sorted({prompt for values in series.values() for prompt in values})
    width = 0.84 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [i + (index - (len(series) - 1) / 2) * width for i in range(len(prompts))]
        heights = [values.get(p, 0) for p in prompts]
        bars = axes.bar(places, heights, width, label=name)
        axes.bar_label(bars, [f"{h:.2f}" for h in heights], fontsize=8, padding=2)
    lines = [(GOALS[run["num_gpus"]], "--", "goal"), (STREAMED_GOALS, ":", "goal, source's token at once")]
    for goals, style, label in lines:
        known = [(i, goals[p]) for i, p in enumerate(prompts) if p in goals]
        for i, goal in known:
            axes.hlines(goal, i - 0.45, i + 0.45, color="black", linestyle=style, linewidth=1)
        if known:
            axes.plot([], [], color="black", linestyle=style, linewidth=1, label=label)
    highest = max(value for values in series.values() for value in values.values())
    axes.set_yscale("log")
    axes.set_ylim(0.9, highest * 3)
    ticks = [t for t in (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20) if t <= highest * 1.3]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(prompts)), [f"{p:,} tokens" for p in prompts])
    axes.set_ylabel("time to first token / one instance's")
    axes.set_title(f"Pair over one instance, {place(run)}")
    axes.legend(fontsize=7, loc="upper right")


def timeline(axes: Any, run: dict[str, Any]) -> None:
    """Stacked bars: what follows the source's last kernel, in ms."""
    rows = [row for row in run["rows"] if row["section"] == "timeline" and "ms" in row]
    if not rows:
        axes.set_axis_off()
        return
    spans = [name for name in rows[0]["ms"] if not name.startswith("source")]
    bottoms = [0.0] * len(rows)
    for name in spans:
        heights = [row["ms"][name] for row in rows]
        bars = axes.bar([f"{row['prompt']:,} tokens" for row in rows], heights, 0.5, bottom=bottoms, label=name)
        axes.bar_label(bars, [f"{h:.1f}" for h in heights], label_type="center", fontsize=8, color="white")
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axes.set_ylim(0, max(bottoms) * 1.4)
    axes.set_ylabel("ms")
    axes.set_title("kvferry, after the source's last kernel")
    axes.legend(fontsize=8, loc="upper center")


def main(arguments: list[str]) -> int:
    runs = [json.loads(Path(path).read_text()) for path in arguments[1:]]
    figure, rows = plt.subplots(len(runs), 2, figsize=(13, 4.6 * len(runs)), width_ratios=(2, 1), squeeze=False)
    for (left, right), run in zip(rows, runs, strict=True):
        ratios(left, run)
        timeline(right, run)
    figure.tight_layout()
    figure.savefig(arguments[0], dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
