"""The plot of benchmarks/peers.py: seconds and memory of a step over the number of teachers, and the loss over N."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_tables import Found

COLOURS = {
    "mtkd": "#1f6f8b",
    "trl": "#c8553d",
    "trl-chunked": "#d99a6c",
    "liger": "#8a8a8a",
    "liger-compiled": "#555555",
}


def plot(path: Path, lines: list[dict[str, Any]]) -> None:
    """Three panels as SVG; a panel without measurements stays empty."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # without these a new file differs from the last one in every line
    plt.rcParams.update({"svg.hashsalt": "mtkd", "svg.fonttype": "none", "font.size": 8})
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    found = Found(lines, "teachers")
    for side in ("mtkd", "trl"):
        for axis, key in ((axes[0], "seconds"), (axes[1], "peak_mb")):
            values = [(k, _teachers(found, side, k, key)) for k in range(1, 5)]
            points = [(k, v) for k, v in values if v < float("inf")]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[side], label=side)
    _loss(axes[2], Found(lines, "loss"))
    for axis, title, label in zip(
        axes,
        ("step, 1 to 4 teachers", "peak memory, 1 to 4 teachers", "loss alone, N = 1,024"),
        ("seconds", "MB", "seconds"),
        strict=True,
    ):
        axis.set(title=title, ylabel=label)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False)
    for axis in axes[:2]:
        axis.set(xlabel="teachers", xticks=range(1, 5))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _teachers(found: Found, side: str, k: int, key: str) -> float:
    if side == "mtkd" and key == "seconds":
        return found.best("slope", f"step_{k}")
    return found.best(f"{side}-{k}", key)


def _loss(axis, found: Found) -> None:
    """Seconds of every side over the vocabulary."""
    columns = sorted({line["options"]["columns"] for line in found.lines if line["options"]["positions"] == 1_024})
    for side, colour in COLOURS.items():
        values = [(v / 1000, found.best(f"{side}-1024-{v}", "best")) for v in columns]
        points = [(v, s) for v, s in values if s < float("inf")]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=side)
    axis.set(xlabel="vocabulary, thousands")
