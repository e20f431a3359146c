"""Tables in Markdown, all figures as CSV, and what they should come to."""

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quality import field
from quality.forced import USUAL, Measured
from quality.trainings import FP32, LEAN, LEANEST, Lesson, Trained

SHOWN_STEPS = (100, 400, 1600)


@dataclass(frozen=True)
class Verdict:
    """``value`` is to be at most ``most``."""

    says: str
    value: float
    most: float

    def __str__(self) -> str:
        met = "met" if self.value <= self.most else "MISSED"
        return f"{met}: {self.says}: {self.value:.3g}, at most {self.most:.3g}"


@dataclass(frozen=True)
class Spread:
    """Of some seeds' losses."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, losses: Sequence[float]) -> "Spread":
        """Sample standard deviation; NaN for one seed."""
        several = len(losses) > 1 and all(map(math.isfinite, losses))
        return cls(statistics.fmean(losses), statistics.stdev(losses) if several else math.nan)


def forced_table(rows: Sequence[Measured]) -> str:
    """One setting's."""
    steps = [step for step in SHOWN_STEPS if step in rows[0].errors] or [rows[0].last]
    heads = ["", "run as", "bytes/param", *(f"error at {step:,}" for step in steps)]
    heads += ["median", "largest update", "on rare rows", "bias of √v", "per element"]
    return _table(
        heads,
        (
            [
                row.contender,
                field.says(row.contender),
                f"{field.FIELD[row.contender].bytes:.2f}",
                *(f"{row.errors[step]:.4f}" for step in steps),
                f"{row.late_error:.4f}",
                _large(row.largest),
                _large(row.largest_rare),
                f"{row.bias:+.4f}",
                f"{row.bias_each:+.4f}",
            ]
            for row in rows
        ),
    )


def sweep_table(rows: Sequence[Measured]) -> str:
    """Error at the end and the largest update, a column for each setting."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    found = {(row.setting, row.contender): row for row in rows}
    names = [name for name in field.FIELD if (settings[-1], name) in found]
    return _table(
        ["", *map(str, settings)],
        (
            [name]
            + [
                f"{row.errors[row.last]:.4f} / {_large(row.largest)}"
                for row in (found[setting, name] for setting in settings)
            ]
            for name in names
        ),
    )


def training_table(lessons: Sequence[Lesson], trained: Sequence[Trained]) -> str:
    """Mean and standard deviation over seeds, and the mean's distance from fp32's."""
    lines = []
    for lesson in lessons:
        spreads = usual_spreads(lesson, trained)
        for name, spread in spreads.items():
            away = spread.mean / spreads[FP32].mean - 1.0
            cells = [lesson.name, name, f"{spread.mean:.4f} ± {spread.deviation:.4f}"]
            lines.append([*cells, f"{away:+.2%}"])
    return _table(["", "", "held-out loss, nats", "mean against fp32"], lines)


def lr_table(lesson: Lesson, trained: Sequence[Trained]) -> str:
    """Mean loss by lr."""
    names = _configurations(lesson, trained)
    return _table(
        [lesson.name, *(f"lr {lr:g}" for lr in lesson.lrs)],
        (
            [name, *(f"{spread_at(lesson, trained, name, lr).mean:.3f}" for lr in lesson.lrs)]
            for name in names
        ),
    )


def usual_spreads(lesson: Lesson, trained: Sequence[Trained]) -> dict[str, Spread]:
    """Of each configuration at the usual lr."""
    names = _configurations(lesson, trained)
    return {name: spread_at(lesson, trained, name, lesson.lr) for name in names}


def spread_at(lesson: Lesson, trained: Sequence[Trained], name: str, lr: float) -> Spread:
    """Of ``name`` at ``lr``, over its seeds."""
    return Spread.of(losses_at(lesson, trained, name, lr))


def losses_at(lesson: Lesson, trained: Sequence[Trained], name: str, lr: float) -> list[float]:
    """Of each seed."""
    wanted = (lesson.name, name, lr)
    return [one.loss for one in trained if (one.lesson, one.configuration, one.lr) == wanted]


def forced_verdicts(rows: Sequence[Measured]) -> Iterator[Verdict]:
    """About our coded formats in the usual setting, at its end."""
    for row in rows:
        most = {field.Q16: 0.02, field.Q8: 0.10}.get(row.contender)
        if row.setting == USUAL and most is not None:
            name = f"{row.contender}, step {row.last:,}"
            yield Verdict(f"{name}, error of the update", row.errors[row.last], most)
            yield Verdict(f"{name}, largest update on rare rows", row.largest_rare, 5.0)


def training_verdicts(lessons: Sequence[Lesson], trained: Sequence[Trained]) -> Iterator[Verdict]:
    """About mean held-out losses at the usual lr."""
    for lesson in lessons:
        spreads = usual_spreads(lesson, trained)
        fp32 = spreads[FP32]
        if LEAN in spreads:
            away = abs(spreads[LEAN].mean - fp32.mean) / fp32.deviation
            yield Verdict(f"{lesson.name}, lean from fp32, in fp32's deviations", away, 1.0)
        if LEANEST in spreads:
            worse = spreads[LEANEST].mean / fp32.mean - 1.0
            yield Verdict(f"{lesson.name}, leanest over fp32, relative", worse, 0.005)


def write_forced(file: Path, stamp: str, rows: Sequence[Measured]) -> None:
    """A line for each step that was compared."""
    heads = ("stamp", "setting", "contender", "step", "error", "largest_until_then")
    lines = (
        (stamp, row.setting, row.contender, step, error, row.growth[step])
        for row in rows
        for step, error in row.errors.items()
    )
    _write(file, heads, lines)


def write_trained(file: Path, stamp: str, trained: Sequence[Trained]) -> None:
    """A line for each training."""
    heads = ("stamp", "lesson", "configuration", "lr", "seed", "held_out_loss")
    lines = ((stamp, one.lesson, one.configuration, one.lr, one.seed, one.loss) for one in trained)
    _write(file, heads, lines)


def _configurations(lesson: Lesson, trained: Sequence[Trained]) -> list[str]:
    return list(dict.fromkeys(one.configuration for one in trained if one.lesson == lesson.name))


def _large(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _write(file: Path, heads: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(heads)
        writer.writerows(lines)
