"""The figures of docs/adam.md, from what `compare.adam_studies` found."""

from pathlib import Path
from statistics import fmean

import torch
from matplotlib import pyplot as plt

from compare.adam_studies import (
    BETA1,
    DECAY_LRS,
    DECAYS,
    LR,
    SGD_LR,
    VALUES,
    Beginning,
    Shares,
    Trial,
)
from compare.style import BLACK, BLUE, GRAY, ORANGE, PURPLE, SKY, VERMILLION, plain, save

LINES = ((SKY, "o"), (ORANGE, "s"), (BLUE, "D"), (VERMILLION, "^"), (BLACK, "v"))


def draw_bias_correction(path: Path, beginnings: tuple[Beginning, Beginning]) -> None:
    """The factor; the size of updates; the loss."""
    figure, (factor, size, loss) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    steps = torch.arange(1, 5001, dtype=torch.float64)
    for beta2, color, dashes in ((0.999, BLUE, "-"), (0.99, ORANGE, "--"), (0.9, PURPLE, ":")):
        values = (1 - BETA1**steps) / (1 - beta2**steps).sqrt()
        factor.plot(steps, values, color=color, linestyle=dashes, label=f"β₂ = {beta2}")
    factor.axhline(1, color=GRAY, linewidth=0.8)
    factor.set_xscale("log")
    factor.set_title("What the update is multiplied by\nif the bias is not corrected", fontsize=11)
    factor.legend(frameon=False)
    for beginning, name, color, dashes in zip(
        beginnings,
        ("corrected", "not corrected"),
        (BLUE, VERMILLION),
        ("-", "--"),
        strict=True,
    ):
        count = range(1, len(beginning.updates) + 1)
        size.plot(count, beginning.updates, color=color, linestyle=dashes, label=name)
        loss.plot(count, beginning.losses, color=color, linestyle=dashes, label=name)
    size.axhline(LR, color=GRAY, linewidth=0.8)
    size.annotate("lr", (1.05, LR * 1.08), color=GRAY)
    size.set_title("Update of a param on the text,\nroot mean square", fontsize=11)
    loss.set_title("Training loss on the text,\nnats per byte", fontsize=11)
    for axes in (size, loss):
        axes.set_xscale("log")
        axes.legend(frameon=False)
    size.set_yscale("log")
    for axes in (factor, size, loss):
        axes.set_xlabel("step")
        plain(axes)
    save(figure, path)


def draw_hyperparameters(path: Path, scores: dict[Trial, float]) -> None:
    """A panel for each of three: a line for each value, against lr."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.8), sharey=True, layout="constrained")
    names = {"beta1": "β₁", "beta2": "β₂", "eps": "ε"}
    untrained = 8.0  # bits per byte
    for axes, (name, values) in zip(panels, VALUES.items(), strict=True):
        default = getattr(Trial("", 0.0), name)
        for value, (color, marker) in zip(values, LINES, strict=False):
            others = {other: getattr(Trial("", 0.0), other) for other in VALUES if other != name}
            mine = {
                trial.lr: found
                for trial, found in scores.items()
                if getattr(trial, name) == value
                and all(getattr(trial, other) == usual for other, usual in others.items())
            }
            label = f"{value:g}" + (", the default" if value == default else "")
            label += ", beyond the top" if min(mine.values()) > untrained else ""
            axes.plot(
                *zip(*sorted(mine.items()), strict=True),
                **{"color": color, "marker": marker, "markersize": 5, "label": label},
                linewidth=2.6 if value == default else 1.4,
            )
        axes.set_xscale("log")
        axes.set_ylim(min(scores.values()) - 0.1, untrained)
        axes.set_title(names[name])
        axes.set_xlabel("lr")
        axes.legend(frameon=False)
        plain(axes)
    panels[0].set_ylabel("bits per byte, validation")
    save(figure, path)


def draw_weight_decay(path: Path, scores: dict[Trial, float]) -> None:
    """Two maps, lr by weight decay: coupled, decoupled."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    found: dict[tuple[bool, float, float], list[float]] = {}
    for trial, value in scores.items():
        found.setdefault((trial.decoupled, trial.weight_decay, trial.lr), []).append(value)
    means = {key: fmean(values) for key, values in found.items()}
    low = min(means.values())
    for axes, decoupled in zip(panels, (False, True), strict=True):
        rows = [[means[decoupled, decay, lr] for lr in DECAY_LRS] for decay in DECAYS]
        image = axes.imshow(rows, cmap="cividis_r", vmin=low, vmax=low * 1.25, aspect="auto")
        best = min(min(row) for row in rows)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                dark = value > low * 1.14
                weight = "bold" if value == best else "normal"
                style = {"color": "white" if dark else "black", "fontweight": weight}
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", **style)
                if value == best:
                    edge = {"edgecolor": VERMILLION, "linewidth": 2.4}
                    axes.add_patch(
                        plt.Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, **edge)
                    )
        axes.set_xticks(range(len(DECAY_LRS)), [f"{lr:g}" for lr in DECAY_LRS])
        axes.set_yticks(range(len(DECAYS)), [f"{decay:g}" for decay in DECAYS])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("lr")
        axes.set_title("decoupled: AdamW" if decoupled else "coupled: Adam, L2")
    panels[0].set_ylabel("weight_decay")
    figure.colorbar(image, ax=panels, label="°C, root mean square, validation", extend="max")
    save(figure, path)


def draw_counterexample(path: Path, places: dict[str, list[float]]) -> None:
    """Where each is, step by step."""
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for (name, values), color, dashes in zip(
        places.items(), (VERMILLION, BLUE), ("-", "--"), strict=True
    ):
        axes.plot(range(1, len(values) + 1), values, color=color, linestyle=dashes, label=name)
    axes.axhline(-1, color=GRAY, linewidth=0.8)
    axes.annotate("the best x", (0, -0.97), color=GRAY)
    axes.set_xlabel("step")
    axes.set_ylabel("x")
    axes.set_ylim(-1.1, 1.3)
    axes.legend(frameon=False, loc="upper left")
    plain(axes)
    save(figure, path)


def draw_shares(path: Path, shares: Shares) -> None:
    """What each byte's row got, and each tensor."""
    figure = plt.figure(figsize=(13, 9.5), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    rates, moved = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    tensors = figure.add_subplot(grid[1, :])
    seen = [byte for byte, count in enumerate(shares.counts) if count]
    counts = [shares.counts[byte] for byte in seen]
    values = [shares.row_rates[byte] for byte in seen]
    rates.scatter(
        counts, values, s=18, color=BLUE, alpha=0.75, label="Adam: lr / (√v̂ + ε), the row's median"
    )
    rates.axhline(SGD_LR, color=ORANGE, linewidth=2, label="SGD: its lr, for all")
    for byte in b" eQz~\n":
        if shares.counts[byte]:
            rates.annotate(
                _shown(byte),
                (shares.counts[byte], shares.row_rates[byte]),
                xytext=(5, -14) if byte in b"Q\n" else (5, 6),
                textcoords="offset points",
                fontsize=10,
                fontweight="bold",
            )
    rates.set_ylabel("what the row's gradient is multiplied by")
    rates.set_title("Rare bytes get larger learning rates", fontsize=12)
    for (name, distances), color, marker in zip(
        shares.moved.items(), (ORANGE, BLUE), ("s", "o"), strict=True
    ):
        mine = [distances[byte] for byte in seen]
        moved.scatter(counts, mine, s=18, color=color, marker=marker, alpha=0.75, label=name)
    moved.set_ylabel("distance from the start, root mean square")
    moved.set_title("… and come nearly as far", fontsize=12)
    for axes in (rates, moved):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("how often the byte came")
        axes.legend(frameon=False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for y, (low, quarter, middle, three, high) in enumerate(shares.tensor_rates.values()):
        tensors.plot([low, high], [y, y], color=BLUE, linewidth=1.2)
        tensors.plot([quarter, three], [y, y], color=BLUE, linewidth=7, solid_capstyle="butt")
        tensors.plot(middle, y, "|", color="white", markersize=9, markeredgewidth=2)
    tensors.axvline(SGD_LR, color=ORANGE, linewidth=2, label="SGD: its lr, for all")
    tensors.legend(frameon=False, loc="lower right")
    tensors.set_yticks(range(len(shares.tensor_rates)), list(shares.tensor_rates))
    tensors.invert_yaxis()
    tensors.set_xscale("log")
    tensors.set_xlabel(
        "lr / (√v̂ + ε): thin: 5 to 95 % of the elements, thick: 25 to 75 %, white: the median"
    )
    tensors.set_title("What each tensor got", fontsize=12)
    tensors.grid(alpha=0.25, linewidth=0.6, axis="x")
    tensors.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _shown(byte: int) -> str:
    return {" ": "space", "\n": "newline"}.get(chr(byte), chr(byte))
