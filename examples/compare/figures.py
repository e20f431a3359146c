"""Three figures and an animation, for people: labelled, and told apart without colours."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from PIL import Image

from compare.contestants import CONTESTANTS
from compare.style import BLACK, VERMILLION, YELLOW, plain, save
from compare.surfaces import SURFACES, Surface, Walk
from compare.tasks import TASKS
from compare.trainings import Trained


def draw_losses(path: Path, note: str, trained: Sequence[Trained]) -> None:
    """Training loss against step, one panel per task: the seeds' mean, from least to most."""
    figure, panels = plt.subplots(len(TASKS), figsize=(10, 14.5), layout="constrained")
    for axes, name in zip(panels, TASKS, strict=True):
        task = TASKS[name]
        runs = [one for one in trained if one.plan.task == name]
        ends, bottom, top = {}, math.inf, 0.0
        for contestant in CONTESTANTS.values():
            mine = [one for one in runs if one.plan.contestant == contestant.name]
            columns = list(zip(*(one.losses for one in mine), strict=True))
            steps = [(i + 0.5) * mine[0].plan.steps / len(columns) for i in range(len(columns))]
            mean = [fmean(column) for column in columns]
            axes.fill_between(
                *(steps, [min(column) for column in columns], [max(column) for column in columns]),
                **{"color": contestant.color, "alpha": 0.08, "linewidth": 0},
            )
            axes.plot(
                *(steps, mean),
                **{"color": contestant.color, "linestyle": contestant.dashes, "linewidth": 1.7},
            )
            label = f"{contestant.name}, lr {mine[0].plan.lr:g}"
            ends[label] = (mean[-1], contestant.color)
            bottom, top = min(bottom, *map(min, columns)), max(top, mean[2])
        axes.set_yscale("log")
        axes.set_ylim(bottom * 0.9, top * 1.1)
        axes.set_xlim(0, runs[0].plan.steps)
        _label_ends(axes, ends)
        axes.set_title(f"{name}: {task.model_name} on {task.data}", loc="left", fontsize=12)
        axes.set_ylabel(task.loss_name)
        plain(axes)
    panels[-1].set_xlabel("step")
    figure.suptitle(
        "Ten optimizers, each at the lr that its tuning chose; bands: least and most of the seeds",
        fontsize=13,
    )
    save(figure, path, note)


def _label_ends(axes: Axes, ends: dict[str, tuple[float, str]]) -> None:
    """Names beside the lines' ends, from top to bottom in their order, a line apart."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    rows = sorted(ends.items(), key=lambda item: -item[1][0])
    heights = [(math.log(end) - low) / (high - low) for _, (end, _) in rows]
    apart, places = 0.058, list(heights)
    for _ in range(500):  # push neighbours apart until none is too near
        for i in range(len(places) - 1):
            if (excess := apart - (places[i] - places[i + 1])) > 0:
                places[i] += excess / 2
                places[i + 1] -= excess / 2
        places = [min(max(place, 0.02), 0.98) for place in places]
    for (label, (_, color)), height, place in zip(rows, heights, places, strict=True):
        axes.annotate(
            label,
            xy=(1.0, height),
            xytext=(1.045, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=color,
            fontsize=9.5,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def draw_lrs(path: Path, note: str, scores: dict[tuple[str, str], dict[float, float]]) -> None:
    """Validation score by optimizer and lr: each cell relative to its optimizer's best."""
    figure, panels = plt.subplots(len(TASKS), figsize=(10.5, 14), layout="constrained")
    colors = matplotlib.colormaps["cividis_r"]
    norm = LogNorm(1.0, 3.0)
    for axes, name in zip(panels, TASKS, strict=True):
        for y, contestant in enumerate(CONTESTANTS.values()):
            row = scores[name, contestant.name]
            best = min(row.values())
            for x, score in enumerate(row.values()):
                worse = min(score / best, 3.0)
                shade = colors(norm(worse))
                axes.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="white"))
                light = sum(shade[:3]) / 3 < 0.5
                text = f"{score:.3g}" if score < 1000 else "×"
                axes.text(
                    *(x + 0.5, y + 0.5, text),
                    **{"ha": "center", "va": "center", "fontsize": 8.5},
                    color="white" if light else "black",
                    fontweight="bold" if score == best else "normal",
                )
                if score == best:
                    edge = {"edgecolor": VERMILLION, "linewidth": 2.4, "zorder": 3}
                    axes.add_patch(
                        plt.Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, fill=False, **edge)
                    )
            lrs = list(row)
            where = _between(lrs, contestant.default_lr)
            if where is not None:
                axes.plot(where, y + 0.86, marker="^", color=VERMILLION, markersize=5, zorder=4)
        axes.set_xlim(0, len(lrs))
        axes.set_ylim(len(CONTESTANTS), 0)
        axes.set_xticks([i + 0.5 for i in range(len(lrs))], [f"{lr:g}" for lr in lrs])
        axes.set_yticks([i + 0.5 for i in range(len(CONTESTANTS))], list(CONTESTANTS))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{name}: {TASKS[name].score_name}, validation", loc="left", fontsize=12)
    panels[-1].set_xlabel(
        "lr        (orange frame: the best; triangle: the class's default lr; ×: over 1,000)"
    )
    mappable = matplotlib.cm.ScalarMappable(norm, colors)
    bar = figure.colorbar(mappable, ax=panels, shrink=0.35, aspect=30, pad=0.02)
    bar.set_ticks([1, 1.2, 1.5, 2, 3], labels=["its best", "1.2 ×", "1.5 ×", "2 ×", "3 × or more"])
    bar.minorticks_off()
    figure.suptitle("How much the learning rate matters", fontsize=13)
    save(figure, path, note)


def _between(lrs: Sequence[float], lr: float) -> float | None:
    """Where ``lr`` is on the axis, in cells."""
    logs = [math.log(one) for one in lrs]
    for i in range(len(lrs) - 1):
        part = (math.log(lr) - logs[i]) / (logs[i + 1] - logs[i])
        if -1e-9 <= part <= 1 + 1e-9:
            return i + 0.5 + part
    return None


def draw_walks(path: Path, note: str, walks: Sequence[Walk]) -> None:
    """A panel for each family on each surface, so that no path hides another."""
    families = (
        ("SGD", "Momentum", "NAG"),
        ("AdaDelta", "AdaGrad", "RMSprop"),  # the one that swings most is below the others
        ("Adam", "AMSGrad", "NAdam", "AdamW"),
    )
    figure, rows = plt.subplots(len(families), len(SURFACES), figsize=(11, 14))
    figure.subplots_adjust(0.05, 0.05, 0.98, 0.94, 0.1, 0.14)
    for family, panels in zip(families, rows, strict=True):
        for axes, surface in zip(panels, SURFACES.values(), strict=True):
            _draw_surface(axes, surface)
            for contestant in map(CONTESTANTS.__getitem__, family):
                (one,) = (
                    one
                    for one in walks
                    if (one.surface, one.contestant) == (surface.name, contestant.name)
                )
                label = f"{one.contestant}, lr {one.lr:g}: {one.heights[-1]:.2g}"
                style = {"color": contestant.color, "linestyle": contestant.dashes}
                axes.plot(*zip(*one.places, strict=True), linewidth=1.4, label=label, **style)
                axes.plot(*one.places[-1], "o", color=contestant.color, markersize=6)
            axes.legend(fontsize=9, loc="lower right", framealpha=0.9)
    steps = len(walks[0].places) - 1
    figure.suptitle(
        f"{steps} steps on Rosenbrock's (left) and Beale's (right) function: lr, and height at the "
        "end\n+: start, star: the minimum, at height 0",
        fontsize=13,
    )
    save(figure, path, note)


def animate_walks(path: Path, walks: Sequence[Walk], frames: int = 70) -> None:
    """The same paths under way, as a GIF of a few hundred KB."""
    figure, panels = plt.subplots(1, len(SURFACES), figsize=(10, 5.1), dpi=80)
    figure.subplots_adjust(0.04, 0.17, 0.99, 0.93, 0.08)
    lines = []
    for axes, surface in zip(panels, SURFACES.values(), strict=True):
        _draw_surface(axes, surface)
        axes.set_title(surface.name)
        for one in walks:
            if one.surface == surface.name:
                contestant = CONTESTANTS[one.contestant]
                style = {"color": contestant.color, "linestyle": contestant.dashes}
                (line,) = axes.plot([], [], linewidth=1.6, label=one.contestant, **style)
                (head,) = axes.plot([], [], "o", color=contestant.color, markersize=7)
                lines.append((one, line, head))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, loc="lower center", frameon=False, fontsize=9.5)
    counter = figure.text(0.01, 0.03, "", fontsize=10)
    steps = len(walks[0].places) - 1
    images = []
    for frame in range(frames + 1):
        # Slow at first, where most of the way is made.
        step = round(steps * (frame / frames) ** 1.7)
        for one, line, head in lines:
            line.set_data(*zip(*one.places[: step + 1], strict=True))
            head.set_data([one.places[step][0]], [one.places[step][1]])
        counter.set_text(f"step {step}")
        figure.canvas.draw()
        picture = Image.frombuffer(
            "RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba().tobytes()
        )
        images.append(picture.convert("RGB"))
    plt.close(figure)
    palette = _palette()
    images = [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in images]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=[90] * frames + [3000],
        loop=0,
        optimize=True,
    )


def _palette() -> Image.Image:
    """Grays, and each colour as it blends into them: one for all frames, which differ in little."""
    grays = [(level, level, level) for level in range(0, 256, 5)]
    colors = {YELLOW, *(contestant.color for contestant in CONTESTANTS.values())}
    blends = [
        tuple(round(255 * (part * channel + (1 - part) * 0.8)) for channel in to_rgb(color))
        for color in sorted(colors)
        for part in (1.0, 0.8, 0.6, 0.4, 0.2)
    ]
    image = Image.new("P", (1, 1))
    image.putpalette([channel for color in [*grays, *blends] for channel in color])
    return image


def _draw_surface(axes: Axes, surface: Surface) -> None:
    x, y = torch.meshgrid(
        torch.linspace(*surface.x_range, 300, dtype=torch.float64),
        torch.linspace(*surface.y_range, 300, dtype=torch.float64),
        indexing="xy",
    )
    heights = torch.log10(surface.height(x, y) + 1e-3)
    axes.contourf(x, y, heights, levels=14, cmap="Greys", alpha=0.45)
    axes.plot(*surface.start, "+", color=BLACK, markersize=13, markeredgewidth=2.5)
    axes.plot(*surface.minimum, "*", color=YELLOW, markeredgecolor=BLACK, markersize=17)
    axes.set_xlim(surface.x_range)
    axes.set_ylim(surface.y_range)
    axes.tick_params(labelsize=8)
