"""The figures of benchmarks/quality.py."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import NullLocator

from quality import field
from quality.forced import RARE, Measured
from quality.report import losses_at, usual_spreads
from quality.trainings import BF16_PARAMS, FP32, LEAN, LEANEST, Lesson, Trained

# Of Okabe and Ito's colours, which people with any colour vision can tell apart; ours are lines
# without gaps.
COLORS = {
    field.FP32: "#888888",
    field.BF16: "#009E73",
    field.Q16: "#0072B2",
    field.Q8: "#56B4E9",
    field.NEAREST: "#E69F00",
    field.COMPANDED: "#D55E00",
    field.DYNAMIC: "#CC79A7",
    field.AO_8BIT: "#666666",
    field.AO_FP8: "#000000",
    BF16_PARAMS: "#E69F00",
    LEAN: "#0072B2",
    LEANEST: "#56B4E9",
}
MARKERS = {FP32: "s", BF16_PARAMS: "D", LEAN: "o", LEANEST: "^"}


def draw_forced(file: Path, stamp: str, rows: Sequence[Measured]) -> None:
    """Error over steps, and the largest update."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 5), gridspec_kw={"width_ratios": [1.3, 1]}
    )
    compared = [row for row in rows if row.contender != field.FP32]
    for row in compared:
        color = COLORS[row.contender]
        ours = row.contender in (field.BF16, field.Q16, field.Q8)
        look = {"lw": 2.2, "zorder": 3} if ours else {"lw": 1.2, "ls": (0, (4, 1.5))}
        left.plot(list(row.errors), list(row.errors.values()), color=color, **look)
    _label_ends(left, compared)
    left.set_xlabel("step", fontsize=9)
    _plain(left, "error of the update: |u − u of fp32| / |u of fp32|")
    rare = [row.largest_rare for row in rows]
    names = [row.contender for row in rows]
    _points(right, {row.contender: row.largest for row in rows}, label="all elements")
    look = {"facecolors": "white", "edgecolors": [COLORS[name] for name in names], "zorder": 4}
    right.scatter(rare, names, s=32, label=f"rows that 1 to {RARE} steps hit", **look)
    right.hlines(names, rare, [row.largest for row in rows], color="#cccccc", lw=1.5)
    right.legend(fontsize=8, frameon=False, loc="upper right")
    _plain(right, "largest |update| of all steps")
    _finish(figure, file, stamp, "Adam's update from coded moments, on fp32's gradients")


def draw_sweeps(file: Path, stamp: str, rows: Sequence[Measured]) -> None:
    """Errors and largest updates, a column for each setting."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    shown = [row for row in rows if row.contender in field.SWEPT]
    options = {"figsize": (13, 6.3), "sharey": "row", "sharex": "row"}
    figure, panels = pyplot.subplots(2, len(settings), **options)
    for setting, (top, bottom) in zip(settings, panels.T, strict=True):
        mine = [row for row in shown if row.setting == setting]
        errors = {row.contender: row.errors[row.last] for row in mine}
        del errors[field.FP32]
        _points(top, errors, edge=1.0)
        _plain(top, str(setting).replace(", ", "\n"))
        _points(bottom, {row.contender: row.largest for row in mine}, edge=1000.0)
        _plain(bottom, "")
    panels[0, 0].set_xlabel("error of the update at the end", fontsize=8)
    panels[1, 0].set_xlabel("largest |update| of all steps", fontsize=8)
    _finish(figure, file, stamp, "The same at other β₂ and other sizes of gradients (▶: off scale)")


def draw_trainings(
    file: Path, stamp: str, lessons: Sequence[Lesson], trained: Sequence[Trained]
) -> None:
    """Held-out losses: of each seed at the usual lr, and by lr."""
    figure, panels = pyplot.subplots(
        len(lessons), 2, figsize=(13, 4.2 * len(lessons)), squeeze=False
    )
    for lesson, (left, right) in zip(lessons, panels, strict=True):
        spreads = usual_spreads(lesson, trained)
        for place, (name, spread) in enumerate(spreads.items()):
            look = {"color": COLORS[name], "marker": MARKERS[name]}
            losses = losses_at(lesson, trained, name, lesson.lr)
            left.scatter(losses, [place] * len(losses), s=30, zorder=3, **look)
            left.plot([spread.mean] * 2, [place - 0.3, place + 0.3], color="#333333", lw=2)
            by_lr = [losses_at(lesson, trained, name, lr) for lr in lesson.lrs]
            means = [statistics.fmean(losses) for losses in by_lr]
            right.plot(lesson.lrs, means, ms=5, lw=1.6, label=name, **look)
            low, high = ([end(losses) for losses in by_lr] for end in (min, max))
            right.fill_between(lesson.lrs, low, high, color=COLORS[name], alpha=0.15, lw=0)
        left.set_yticks(range(len(spreads)), list(spreads))
        left.invert_yaxis()
        left.margins(y=0.3)
        left.set_xlabel(f"held-out loss, nats per {lesson.per}", fontsize=9)
        right.set_xscale("log")
        right.set_yscale("log")
        right.yaxis.set_minor_locator(NullLocator())
        low, high = right.get_ylim()
        ticks = [
            tick
            for tick in (0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
            if low < tick < high
        ]
        right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        right.set_xlabel("learning rate", fontsize=9)
        right.legend(fontsize=8, frameon=False)
        _plain(left, f"{lesson.name}, lr {lesson.lr:g}: each seed, and the mean as a bar")
        _plain(right, f"{lesson.name}: mean and range of seeds")
    _finish(figure, file, stamp, "Whole trainings, on data that was never trained on")


def _points(
    axes: Any, values: Mapping[str, float], edge: float = math.inf, label: str | None = None
) -> None:
    """A point with its number for each contender; at the ``edge`` of what is farther out."""
    for name, value in values.items():
        far = value > edge
        place = (edge if far else value, name)
        text = f"{value:.3f}" if value < 1 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        look = {"color": COLORS[name], "marker": ">" if far else "o", "zorder": 3}
        axes.scatter(*place, s=45, label=label, **look)
        axes.annotate(f"  {text}", place, fontsize=7, va="bottom")
        label = None  # once
    axes.set_xscale("log")
    axes.margins(x=0.22)
    axes.set_ylim(len(values) - 0.5, -0.5)


def _label_ends(axes: Any, rows: Sequence[Measured]) -> None:
    """Names at the right ends of lines, a text's height apart, on a logarithmic axis."""
    axes.set_yscale("log")
    axes.set_xlim(0, max(row.last for row in rows))
    low, high = axes.get_ylim()
    height, apart = 0.0, (high / low) ** 0.036
    for row in sorted(rows, key=lambda row: row.errors[row.last]):
        height = max(row.errors[row.last], height * apart)
        axes.annotate(
            f" {row.contender}, {row.errors[row.last]:.3f}",
            (row.last, height),
            color=COLORS[row.contender],
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#eeeeee", zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _finish(figure: Any, file: Path, stamp: str, title: str) -> None:
    figure.suptitle(title, fontsize=11)
    figure.text(0.01, 0.01, textwrap.fill(stamp, 170), fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
