"""The scores as a table, and what they say about what is often said."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from compare.contestants import CONTESTANTS
from compare.tasks import TASKS
from compare.trainings import Trained

NEAR = 1.1
"""An lr is near the best one if its score is at most so many times the best one's."""

Scores = dict[tuple[str, str], list[float]]
"""Of each task and optimizer, by seed."""
ByLr = dict[tuple[str, str], dict[float, float]]


def by_seed(trained: Sequence[Trained]) -> Scores:
    """The test scores; the same place in each list is the same seed."""
    scores: Scores = {}
    for one in sorted(trained, key=lambda one: one.plan.seed):
        scores.setdefault((one.plan.task, one.plan.contestant), []).append(one.score)
    return scores


def scores_table(trained: Sequence[Trained]) -> str:
    """Markdown: test score, its standard deviation over the seeds, and rank and lr."""
    scores = by_seed(trained)
    lrs = {(one.plan.task, one.plan.contestant): one.plan.lr for one in trained}
    lines = [
        f"| | {' | '.join(f'{name}, {task.score_name}' for name, task in TASKS.items())} |",
        f"|---|{'---|' * len(TASKS)}",
    ]
    for contestant in CONTESTANTS:
        cells = []
        for task in TASKS:
            values = scores[task, contestant]
            place = ranking(scores, task).index(contestant) + 1
            cell = f"{_shown(values)} ({place}.; lr {lrs[task, contestant]:g})"
            cells.append(f"**{cell}**" if place == 1 else cell)
        lines.append(f"| {contestant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(values: Sequence[float]) -> str:
    """The mean and the deviation of the seeds."""
    if diverged := sum(not math.isfinite(value) for value in values):
        return f"diverged, {diverged} of {len(values)}"
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def near_table(scores: ByLr) -> str:
    """Markdown: at how many lrs of the grid an optimizer is near its own best."""
    lines = [f"| | {' | '.join(TASKS)} | all |", f"|---|{'---|' * (len(TASKS) + 1)}"]
    for contestant in CONTESTANTS:
        counts = [near(scores[task, contestant]) for task in TASKS]
        lines.append(f"| {contestant} | {' | '.join(map(str, counts))} | {sum(counts)} |")
    return "\n".join(lines)


def ranking(scores: Scores, task: str) -> list[str]:
    """Optimizers by their mean test score, the best first."""
    return sorted(CONTESTANTS, key=lambda name: fmean(scores[task, name]))


def near(row: dict[float, float]) -> int:
    """Lrs whose score is near the best."""
    return sum(score <= NEAR * min(row.values()) for score in row.values())


def claims(trained: Sequence[Trained], tuned: ByLr) -> list[str]:
    """Five sentences that are often read, each with what was found here."""
    scores = by_seed(trained)

    def beats(first: str, second: str) -> str:
        found = []
        for task in TASKS:
            pairs = list(zip(scores[task, first], scores[task, second], strict=True))
            wins = sum(one < other for one, other in pairs)
            change = fmean(a for a, _ in pairs) / fmean(b for _, b in pairs) - 1
            found.append(f"{task}: {wins} of {len(pairs)} seeds, mean {change:+.1%}")
        return f"{first} better than {second}: {'; '.join(found)}."

    places = [ranking(scores, task) for task in TASKS]
    adam = ", ".join(
        f"{task}: {place.index('Adam') + 1}., the first is {place[0]}"
        for task, place in zip(TASKS, places, strict=True)
    )
    delta = "; ".join(
        f"{task}: {tuned[task, 'AdaDelta'][1.0]:.3g} at lr 1, {min(row.values()):.3g} at lr "
        f"{min(row, key=row.__getitem__):g}"
        for task in TASKS
        for row in (tuned[task, "AdaDelta"],)
        if 1.0 in row
    )
    width = ", ".join(
        f"{name} {sum(near(tuned[task, name]) for task in TASKS)}" for name in CONTESTANTS
    )
    return [
        f'"Adam is always best." {adam}.',
        f'"AMSGrad fixes Adam." {beats("AMSGrad", "Adam")}',
        f'"AdaDelta needs no learning rate." Validation: {delta}.',
        f'"NAG beats momentum." {beats("NAG", "Momentum")}',
        f'"Adam is robust to the learning rate." Lrs within {NEAR - 1:.0%} of the own best, of '
        f"{sum(len(tuned[task, 'Adam']) for task in TASKS)}: {width}.",
        f'"AdamW generalizes better than Adam." {beats("AdamW", "Adam")}',
    ]


def write_csv(path: Path, trained: Sequence[Trained]) -> None:
    """Every training, a line each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "optimizer", "lr", "seed", "steps", "part", "start", "score"])
        for one in trained:
            plan = one.plan
            writer.writerow(
                [
                    *(plan.task, plan.contestant, plan.lr, plan.seed, plan.steps, plan.part),
                    *(one.start, one.score),
                ]
            )
