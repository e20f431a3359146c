"""What each part of Adam does, measured on the tasks; drawn by `compare.adam_plots`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.pool import Pool

import torch
from torch import Tensor

import shardadam
from compare.contestants import CONTESTANTS
from compare.tasks import Text, load
from compare.trainings import Plan, in_parallel, steps_of, train_by

LR, SGD_LR = 1e-2, 3.0
"""About the best for Adam and for SGD on the text (docs/compare_optimizers.md)."""
LRS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
VALUES: dict[str, tuple[float, ...]] = {
    "beta1": (0.0, 0.5, 0.9, 0.99),
    "beta2": (0.0, 0.9, 0.99, 0.999, 0.9999),
    "eps": (1e-8, 1e-4, 1e-2, 1.0),
}
DECAYS = (0.0, 1e-3, 1e-2, 0.1, 1.0, 10.0)
DECAY_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Trial:
    """One training by Adam with these hyperparameters."""

    task: str
    lr: float
    beta1: float = BETA1
    beta2: float = BETA2
    eps: float = EPS
    weight_decay: float = 0.0
    decoupled: bool = False
    steps: int = 300
    seed: int = 0


def score(trial: Trial) -> float:
    """On validation data, at the end; infinite where it diverged."""
    kind = shardadam.AdamW if trial.decoupled else shardadam.Adam
    make = partial(
        kind,
        lr=trial.lr,
        betas=(trial.beta1, trial.beta2),
        eps=trial.eps,
        weight_decay=trial.weight_decay,
    )
    plan = Plan(trial.task, "Adam", trial.lr, trial.seed, trial.steps, "validation")
    return train_by(make, plan)[-1]


@dataclass(frozen=True)
class Beginning:
    """Of a training: the loss and the root mean square update of a param, at each step."""

    losses: list[float]
    updates: list[float]


def begin(job: tuple[bool, int]) -> Beginning:
    """``job``: is the bias corrected, and how many steps."""
    corrected, steps = job
    torch.manual_seed(0)
    task = load("Text")
    model = task.model()
    optimizer = shardadam.Adam(model.parameters(), lr=LR)
    group = optimizer.param_groups[0]
    losses, updates = [], []
    before = _flat(model.parameters())
    trained = steps_of(task, model, optimizer, 0)
    for step in range(1, steps + 1):
        if not corrected:
            # Nobody offers an Adam without the correction. These two undo it:
            # lr·√c₂/c₁·m / (√v + eps·√c₂)  becomes  lr·m / (√v + eps).
            root = math.sqrt(1 - BETA2**step)
            group["lr"], group["eps"] = LR * (1 - BETA1**step) / root, EPS / root
        losses.append(next(trained))
        after = _flat(model.parameters())
        updates.append((after - before).square().mean().sqrt().item())
        before = after
    return Beginning(losses, updates)


def _flat(params: Iterator[Tensor]) -> Tensor:
    return torch.cat([param.detach().flatten() for param in params])


@dataclass(frozen=True)
class Shares:
    """What the params got. Rows are those of the embedding, one per byte."""

    counts: list[int]
    """How often each byte was an input."""
    moved: dict[str, list[float]]
    """By optimizer: how far each row is from where it started, root mean square."""
    row_rates: list[float]
    """Adam's lr / (√v̂ + eps), the median of each row; 0 where the byte never came."""
    tensor_rates: dict[str, list[float]]
    """The same of each tensor of the network: percentiles 5, 25, 50, 75, 95."""


def share(steps: int) -> Shares:
    """Train the text's network by Adam and by SGD, and see who got what."""
    task = load("Text")
    assert isinstance(task, Text)
    counts = torch.zeros(256, dtype=torch.long)
    for step in range(steps):
        counts += task.batch(0, step)[0].flatten().bincount(minlength=256)
    moved: dict[str, list[float]] = {}
    for name, lr in (("SGD", SGD_LR), ("Adam", LR)):
        torch.manual_seed(0)
        model = task.model()
        table = model.get_parameter("embedding.weight")
        start = table.detach().clone()
        optimizer = CONTESTANTS[name](model.parameters(), lr)
        for _ in islice(steps_of(task, model, optimizer, 0), steps):
            pass
        moved[name] = (table.detach() - start).square().mean(1).sqrt().tolist()
    rates = {}
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        second = state["exp_avg_sq"] / (1 - BETA2 ** state["step"].item())
        rates[name] = LR / (second.sqrt() + EPS)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    seen = counts > 0
    tensor_rates = {
        name: torch.quantile(rate[seen] if name == "embedding.weight" else rate, levels).tolist()
        for name, rate in rates.items()
    }
    rows = torch.where(seen, rates["embedding.weight"].median(1).values, 0.0)
    return Shares(counts.tolist(), moved, rows.tolist(), tensor_rates)


def counterexample(job: tuple[str, int]) -> list[float]:
    """Where Adam goes the wrong way for ever: large gradients that are rare (Reddi et al. 2018).

    The loss is 100,000 x at every 5,001st step and -10 x at the others, x within [-1, 1]: on
    average it falls towards x = -1. exp_avg_sq has forgotten the one before the next comes. By
    "Adam" or "AMSGrad", so many steps.
    """
    name, steps = job
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = CONTESTANTS[name]([x], lr=0.01)
    places = []
    for step in range(steps):
        x.grad = torch.full_like(x, 1e5 if step % 5001 == 0 else -10.0)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
        places.append(x.item())
    return places


@dataclass(frozen=True)
class Found:
    """All of it."""

    hyperparameters: dict[Trial, float]
    weight_decay: dict[Trial, float]
    beginnings: tuple[Beginning, Beginning]
    """With the bias corrected, and without."""
    counterexample: dict[str, list[float]]
    shares: Shares


def measure(pool: Pool, quick: bool) -> Found:
    """All of it, in parallel."""
    steps = 10 if quick else 300
    trials = dict.fromkeys(
        Trial("Text", lr, steps=steps, **{name: value})
        for name, values in VALUES.items()
        for value in values
        for lr in (LRS[::6] if quick else LRS)
    )
    scores = in_parallel(pool, score, list(trials), "beta1, beta2, eps")
    decays = [
        Trial(
            *("Time series", lr),
            weight_decay=decay,
            decoupled=decoupled,
            steps=20 if quick else 1000,
            seed=seed,
        )
        for decoupled in (False, True)
        for decay in DECAYS
        for lr in DECAY_LRS
        for seed in range(1 if quick else 3)
    ]
    decayed = in_parallel(pool, score, decays, "weight decay")
    jobs = [(True, steps), (False, steps)]
    beginnings = in_parallel(pool, begin, jobs, "bias correction")
    names = ("Adam", "AMSGrad")
    walks = [(name, 2_000 if quick else 60_000) for name in names]
    places = in_parallel(pool, counterexample, walks, "counterexample")
    (shares,) = in_parallel(pool, share, [steps], "who got what")
    return Found(
        dict(zip(trials, scores, strict=True)),
        dict(zip(decays, decayed, strict=True)),
        (beginnings[0], beginnings[1]),
        dict(zip(names, places, strict=True)),
        shares,
    )
