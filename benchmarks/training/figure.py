"""A setting's table as bars, the quartiles as whiskers."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from training.contenders import OURS
from training.report import label
from training.results import Row, Spread
from training.rounds import Setting

OUR_COLOR, PEER_COLOR = "#1f5fbf", "#b9bec8"


def draw(file: Path, setting: Setting, stamp: str, rows: Sequence[Row]) -> str | None:
    """Draw ``rows``; None, or why that could not be."""
    try:
        import matplotlib
    except ImportError as error:
        return f"matplotlib is not installed ({error})"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    spreads: dict[str, Callable[[Row], Spread]] = {
        "iteration, ms": lambda row: row.wall,
        "iteration, CPU-ms per rank": lambda row: row.cpu,
        "step, CPU-ms per rank": lambda row: row.step_cpu,
    }
    figures: dict[str, Callable[[Row], float]] = {
        "peak RSS, MB": lambda row: row.peak_rss_bytes / 1e6,
        "moments and masters, MB per rank": lambda row: row.state_bytes / 1e6,
    }
    if setting.world_size > 1 and rows[0].device_bytes is not None:
        figures["wire, MB per step and rank"] = lambda row: (row.device_bytes or 0) / 1e6
    names = [label(setting, row) for row in rows]
    colors = [OUR_COLOR if name.startswith(OURS) else PEER_COLOR for name in names]
    figure, panels = pyplot.subplots(
        2, 3, figsize=(13, 2.2 + 0.5 * len(rows)), sharey=True, squeeze=False
    )
    axes = iter(panels.flat)
    for title, spread in spreads.items():
        found = [spread(row) for row in rows]
        middles = [one.middle for one in found]
        whiskers = [
            [one.middle - one.low for one in found],
            [one.high - one.middle for one in found],
        ]
        _bars(next(axes), title, names, middles, colors, whiskers)
    for title, value in figures.items():
        _bars(next(axes), title, names, [value(row) for row in rows], colors, None)
    for unused in axes:
        unused.set_visible(False)
    figure.suptitle(f"{setting}", fontsize=11)
    note = textwrap.fill(f"Medians and quartiles. {stamp}", 170)
    figure.text(0.01, 0.01, note, fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return None


def _bars(
    axes: object,
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    colors: Sequence[str],
    whiskers: Sequence[Sequence[float]] | None,
) -> None:
    options = {"error_kw": {"ecolor": "#333333", "elinewidth": 1, "capsize": 2}}
    bars = axes.barh(names, values, color=colors, xerr=whiskers, **options if whiskers else {})
    labels = [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.18)
    if not axes.yaxis_inverted():  # shared: once
        axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
