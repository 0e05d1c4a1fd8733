"""A bar chart of the figures; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from typing import Any

from kvferry.errors import ConfigError
from kvferry.pool.bench.cases import CASES

_TITLES = {
    "get-1m": "get, 1 MiB blocks, 64 a call, GB/s",
    "put-1m": "put, 1 MiB blocks, 64 a call, GB/s",
    "get-64k": "get, 64 KiB blocks, 256 a call, GB/s",
    "put-64k": "put, 64 KiB blocks, 256 a call, GB/s",
    "get-1m-single": "get, 1 MiB blocks one by one, GB/s",
    "put-1m-single": "put, 1 MiB blocks one by one, GB/s",
    "exists": "exists, 1,000 keys in one call, p50 ms (lower is better)",
    "disk-write": "disk tier, writing 1 MiB blocks, GB/s",
    "disk-read": "disk tier, reading 1 MiB blocks, GB/s",
    "restart": "restart until all blocks on disk are served, p50 ms",
}


def plot(figures: list[dict[str, Any]], path: str) -> None:
    """Write a PNG with one panel a case. Raises: ConfigError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'kvferry[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in CASES if any(row["case"] == name for row in figures)]
    heights = [1.0 + sum(row["case"] == name for row in figures) for name in shown]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(8, 0.34 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, case in zip(axes[:, 0], shown, strict=True):
        rows = [row for row in figures if row["case"] == case]
        values = [row.get("GBps", row.get("p50_ms", 0.0)) for row in rows]
        colours = ["#c0504d" if row["system"].startswith("kvferry") else "#8c9bab" for row in rows]
        bars = axis.barh([row["system"] for row in rows], values, color=colours)
        axis.bar_label(bars, padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(_TITLES[case], fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
