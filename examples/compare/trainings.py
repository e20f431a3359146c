"""Every optimizer gets the same tuning, then the same trainings, side by side on the cores."""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice, pairwise
from multiprocessing import get_context
from multiprocessing.pool import Pool
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from compare.contestants import CONTESTANTS
from compare.tasks import TASKS, Part, Task, load

Job, Result = TypeVar("Job"), TypeVar("Result")

POINTS = 60
"""Of a loss curve, each the mean over as many steps."""
FIRST_SEED = 100
"""Of the trainings that count: none of those that the tuning has seen."""


@dataclass(frozen=True)
class Plan:
    """One training: by which optimizer, at which lr, from which initial weights and batches."""

    task: str
    contestant: str
    lr: float
    seed: int
    steps: int
    part: Part
    """What it is measured on in the end."""


@dataclass(frozen=True)
class Trained:
    """``losses``: of training, POINTS means; ``score``: held out. Infinite where it diverged."""

    plan: Plan
    start: float
    losses: tuple[float, ...]
    score: float


def steps_of(task: Task, model: nn.Module, optimizer: Optimizer, seed: int) -> Iterator[float]:
    """Train without end, yielding the loss before each step."""
    for step in count():
        loss = task.loss(model, *task.batch(seed, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def train(plan: Plan) -> Trained:
    """From initial weights, which are the same for all optimizers of a seed, to the score."""
    make = CONTESTANTS[plan.contestant]
    return Trained(plan, *train_by(lambda params: make(params, plan.lr), plan))


def train_by(
    make: Callable[[Iterable[Tensor]], Optimizer], plan: Plan
) -> tuple[float, tuple[float, ...], float]:
    """The same by an optimizer of any make: its score before, its losses, its score after."""
    task = load(plan.task)
    torch.manual_seed(plan.seed)
    model = task.model()
    start = task.score(model, plan.part)
    losses: list[float] = []
    for loss in islice(steps_of(task, model, make(model.parameters()), plan.seed), plan.steps):
        if not math.isfinite(loss):
            losses += [math.inf] * (plan.steps - len(losses))
            return start, _points(losses), math.inf
        losses.append(loss)
    score = task.score(model, plan.part)
    return start, _points(losses), score if math.isfinite(score) else math.inf


def _points(losses: Sequence[float]) -> tuple[float, ...]:
    """Means over equal parts of the steps."""
    cuts = [round(i * len(losses) / POINTS) for i in range(POINTS + 1)]
    parts = (losses[a:b] for a, b in pairwise(cuts))
    return tuple(fmean(part) for part in parts if part)


@contextmanager
def workers(processes: int) -> Iterator[Pool]:
    """Processes of one thread each. Spawned: they inherit no lock that a thread here holds."""
    with get_context("spawn").Pool(processes, _begin) as pool:
        yield pool
        pool.close()
        pool.join()  # so that the system knows what time they took


def _begin() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends them


def in_parallel(
    pool: Pool, function: Callable[[Job], Result], jobs: Sequence[Job], what: str
) -> list[Result]:
    """``function`` of each, in order, under a progress bar."""
    return list(tqdm(pool.imap(function, jobs), what, total=len(jobs)))


def tuning(lrs: Iterable[float], seeds: int, steps: dict[str, int]) -> list[Plan]:
    """Each optimizer at each lr of the grid. Long tasks first, so that no core is left alone."""
    plans = [
        Plan(task, name, lr, seed, steps[task], "validation")
        for task in TASKS
        for name in CONTESTANTS
        for lr in lrs
        for seed in range(seeds)
    ]
    return sorted(plans, key=lambda plan: plan.task != "Text")


def finals(best: dict[tuple[str, str], float], seeds: int, steps: dict[str, int]) -> list[Plan]:
    """Each optimizer at its ``best`` lr, from other seeds, measured on what nobody has seen."""
    plans = [
        Plan(task, name, lr, FIRST_SEED + seed, steps[task], "test")
        for (task, name), lr in best.items()
        for seed in range(seeds)
    ]
    return sorted(plans, key=lambda plan: plan.task != "Text")


def by_lr(tuned: Sequence[Trained]) -> dict[tuple[str, str], dict[float, float]]:
    """Of each task and optimizer, the mean validation score at each lr."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for one in tuned:
        row = scores.setdefault((one.plan.task, one.plan.contestant), {})
        row.setdefault(one.plan.lr, []).append(one.score)
    return {
        key: {lr: fmean(values) for lr, values in sorted(row.items())}
        for key, row in scores.items()
    }
