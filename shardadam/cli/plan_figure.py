"""The plans as a picture: a bar for each mode, stacked of what takes memory, a panel for each W."""

import itertools
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from shardadam.cli.footprint import GRADS, MEMORIES, Footprint, Plan
from shardadam.cli.telling import CommandError

_COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#aa3377")  # told apart by all eyes (Tol)
_LABELS = {"transients": "in transit"}


def check() -> None:
    """Raise CommandError where nothing can be drawn."""
    if find_spec("matplotlib") is None:
        raise CommandError('--png draws with matplotlib: pip install "shardadam[demo]"')


def draw(plans: Sequence[Plan], memory: int | None, title: str, path: Path) -> None:
    """Write a PNG; ``memory``: bytes per rank, a line."""
    from matplotlib.figure import Figure

    ranks = list(dict.fromkeys(plan.world_size for plan in plans))
    dtypes = dict.fromkeys(plan.dtype for plan in plans)
    there = {(plan.dtype, plan.memory, plan.grads) for plan in plans}
    modes = [mode for mode in itertools.product(dtypes, MEMORIES, GRADS) if mode in there]
    by_mode = {(p.world_size, p.dtype, p.memory, p.grads): p.footprint for p in plans}
    most = max(max(plan.footprint.total for plan in plans), memory or 0)
    unit, name = next((u, n) for u, n in _UNITS if most >= u)
    figure = Figure(
        figsize=(2.6 + 3.2 * len(ranks), 1.9 + 0.27 * len(modes)), layout="constrained", dpi=150
    )
    panels = figure.subplots(1, len(ranks), sharex=True, sharey=True, squeeze=False)[0]
    for panel, world_size in zip(panels, ranks, strict=True):
        for row, mode in enumerate(modes):
            footprint = by_mode.get((world_size, *mode))
            if footprint is not None:
                _bar(panel, row, footprint, unit)
        if memory is not None:
            panel.axvline(memory / unit, color="black", linestyle="--", linewidth=1)
        panel.set_title(f"{world_size} rank{'s' * (world_size != 1)}", fontsize=10)
        panel.set_xlabel(f"{name} per rank", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(modes)), [f"{d}, {m}, {g}" for d, m, g in modes])
    panels[0].invert_yaxis()
    panels[0].margins(y=0.01)
    drawn = [panel.get_legend_handles_labels() for panel in panels]
    found = {label: bar for bars, labels in drawn for bar, label in zip(bars, labels, strict=True)}
    names = [_LABELS.get(field.name, field.name) for field in fields(Footprint)]
    shown = {name: found[name] for name in names if name in found}
    if memory is not None:
        (shown["memory"],) = panels[0].plot([], [], color="black", linestyle="--", linewidth=1)
    figure.suptitle(title, fontsize=11)
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    figure.savefig(path, format="png")


_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (1, "bytes"))


def _bar(panel: object, row: int, footprint: Footprint, unit: int) -> None:
    left = 0.0
    for field, color in zip(fields(Footprint), _COLORS, strict=True):
        width = getattr(footprint, field.name) / unit
        if width:
            label = _LABELS.get(field.name, field.name)
            panel.barh(row, width, left=left, color=color, height=0.72, label=label)  # type: ignore[attr-defined]
        left += width
