"""A bar chart of the figures; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from typing import Any

from kvferry.errors import ConfigError

_TITLES = {
    "paged": "paged: shuffled 64 KiB blocks, GB/s",
    "big": "big: 16 MiB blocks, GB/s",
    "lat4k": "lat4k: one 4 KiB block, p50 µs (lower is better)",
}


def plot(figures: list[dict[str, Any]], path: str) -> None:
    """Write a PNG with one panel a case. Raises: ConfigError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'kvferry[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in _TITLES if any(row["case"] == name for row in figures)]
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(8, 2.6 * len(shown)), squeeze=False)
    for axis, case in zip(axes[:, 0], shown, strict=True):
        rows = [row for row in figures if row["case"] == case]
        values = [row.get("GBps", row.get("p50_us", 0.0)) for row in rows]
        names = [row["system"] for row in rows]
        colours = ["#c0504d" if name.startswith("kvferry") else "#8c9bab" for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, padding=3, fontsize=8)
        if case == "lat4k":
            axis.set_xscale("log")  # Microseconds to milliseconds.
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(_TITLES[case], fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
