"""Bandwidth against size, a panel for every format, with the copy's as the roof."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.speed import COPY, FOREACH, FORMATS, FUSED, FUSED_BF16, KERNEL, OURS

COLORS = {
    OURS: "#1f5fbf",
    KERNEL: "#7fb0f0",
    FUSED: "#e07b1a",
    FOREACH: "#b8860b",
    FUSED_BF16: "#c9a27c",
    COPY: "#555555",
}
OTHERS = ("#2e8b57", "#8a4fbf")


def draw(file: Path, title: str, rows: Sequence[dict[str, Any]]) -> str | None:
    """Draw ``rows`` of `speed`; None, or why that could not be."""
    if not rows:
        return "nothing was measured"
    try:
        import matplotlib
    except ImportError as error:
        return f"matplotlib is not installed ({error})"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["name"] for row in rows))
    unknown = [name for name in names if name not in COLORS]
    colors = {**COLORS, **dict(zip(unknown, OTHERS, strict=False))}
    figure, panels = pyplot.subplots(
        2, len(FORMATS), figsize=(14, 8), sharex=True, sharey="row", squeeze=False
    )
    for line, l2 in zip(panels, ("cold", "warm"), strict=True):
        for axes, format in zip(line, FORMATS, strict=True):
            for name in names:
                here = [
                    row
                    for row in rows
                    if (row["l2"], row["format"], row["name"]) == (l2, format.name, name)
                ]
                if not here:
                    continue
                sizes = [row["elements"] for row in here]
                low, middle, high = zip(*(row["GBps"] for row in here), strict=True)
                style = "--" if name == COPY else "-"
                axes.plot(sizes, middle, style, color=colors[name], label=name, marker=".")
                axes.fill_between(sizes, low, high, color=colors[name], alpha=0.2, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.set_title(f"{format.name}, {format.moved} bytes per param, L2 {l2}", fontsize=10)
        line[0].set_ylabel("GB/s, median and quartiles")
    for axes in panels[-1]:
        axes.set_xlabel("elements")
    entries: dict[str, Any] = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    figure.suptitle(title)
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=4, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    return None
