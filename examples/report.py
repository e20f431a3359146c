"""What is seen at the end: a table, a sample, a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from progress import megabytes
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GRAY = "#0072B2", "#E69F00", "#666666"


@dataclass(frozen=True)
class Run:
    """One finished training."""

    optimizer: str
    losses: list[float]  # nats per byte, mean over the ranks, one per step
    param_bytes: int
    state_bytes: list[int]  # one per rank
    held_out_bits: float  # per byte
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Zlib:
    """What a general-purpose compressor makes of the held-out text."""

    held_out_bits: float  # per byte
    seconds: float


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this rank's optimizer state, counted tensor by tensor."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def print_table(console: Console, title: str, runs: Sequence[Run], zlib: Zlib) -> None:
    """One column per run, and one for zlib."""
    table = Table(title=title, title_style="bold", box=box.ROUNDED)
    table.add_column("")
    for run in runs:
        table.add_column(run.optimizer, justify="right")
    table.add_column("zlib -9", justify="right")
    table.add_row("params", *(megabytes(run.param_bytes) for run in runs), "")
    for rank, sizes in enumerate(zip(*(run.state_bytes for run in runs), strict=True)):
        table.add_row(f"state, rank {rank}", *map(megabytes, sizes), "")
    table.add_section()
    bits = [f"{run.held_out_bits:.3f}" for run in runs]
    table.add_row("held-out bits per byte", *bits, f"{zlib.held_out_bits:.3f}", style="bold")
    table.add_section()
    table.add_row("time", *(f"{run.seconds:.1f} s" for run in runs), f"{zlib.seconds:.2f} s")
    table.add_row("tokens/s", *(f"{run.tokens_per_second:,.0f}" for run in runs), "")
    console.print(table)


def print_sample(console: Console, prompt: bytes, generated: bytes) -> None:
    """The prompt in bold, and how the model went on."""
    text = Text(prompt.decode(), style="bold")
    text.append(generated[len(prompt) :].decode(errors="replace"), style="not bold")
    console.print(Panel(text, title="the model writes", border_style="dim"))


def draw(path: Path, title: str, runs: Sequence[Run], zlib: Zlib) -> None:
    """The loss curves, and below them their difference where there are two."""
    bits = [[loss / math.log(2) for loss in run.losses] for run in runs]
    heights = [3, 1][: len(runs)]
    figure, rows = plt.subplots(
        len(runs),
        sharex=True,
        squeeze=False,
        figsize=(9, 2.25 * sum(heights) / len(heights) + 1.5),
        height_ratios=heights,
        layout="constrained",
    )
    curves = rows[0, 0]
    # The two nearly coincide: the second is drawn first, and wider, so that both are seen.
    looks = [(BLUE, 1.4, 3), (ORANGE, 5.0, 2)]
    for run, values, (color, line_width, order) in zip(runs, bits, looks, strict=False):
        label = f"{run.optimizer} (held out: {run.held_out_bits:.3f})"
        curves.plot(_steps(values), values, color=color, alpha=0.18, linewidth=0.6)
        curves.plot(
            _steps(values),
            _smooth(values),
            color=color,
            linewidth=line_width,
            zorder=order,
            label=label,
        )
    curves.axhline(
        zlib.held_out_bits,
        color=GRAY,
        linewidth=1.2,
        linestyle="--",
        label=f"zlib -9 on the held-out text: {zlib.held_out_bits:.3f}",
    )
    curves.set_ylabel("training loss, bits per byte")
    # The first steps fall from 8 bits; what there is to see is below.
    curves.set_ylim(
        bottom=min(map(min, bits)) * 0.95, top=max(max(b[len(b) // 50 :]) for b in bits)
    )
    curves.legend(frameon=False)
    curves.set_title(title, fontsize=11)
    if len(runs) == 2:
        difference = [ours - theirs for ours, theirs in zip(*bits, strict=True)]
        panel = rows[1, 0]
        panel.axhline(0, color=GRAY, linewidth=0.8)
        panel.plot(_steps(difference), difference, color=BLUE, alpha=0.25, linewidth=0.6)
        panel.plot(_steps(difference), _smooth(difference), color=BLUE, linewidth=1.4)
        panel.set_ylabel("shardadam − torch")
    rows[-1, 0].set_xlabel("step")
    rows[-1, 0].set_xlim(0, len(bits[0]))
    for axes in rows.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, linewidth=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _steps(values: Sequence[float]) -> range:
    return range(1, len(values) + 1)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over about a fiftieth of the steps, around each step, so that it doesn't lag behind."""
    reach = len(values) // 100
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
