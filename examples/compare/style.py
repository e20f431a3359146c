"""What all figures look like."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
ORANGE, VERMILLION, PURPLE, GRAY = "#E69F00", "#D55E00", "#CC79A7", "#666666"
YELLOW = "#F0E442"


def plain(axes: Axes) -> None:
    """A faint grid, no frame, and 0.2 instead of 2 × 10⁻¹ on a logarithmic axis of losses."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.grid(axis="y", which="minor", alpha=0.25, linewidth=0.6)
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path, note: str = "") -> None:
    """As PNG, ``note`` in small letters below."""
    if note:
        figure.supxlabel(note, fontsize=7, color=GRAY, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
