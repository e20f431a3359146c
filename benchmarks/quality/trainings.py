"""Whole trainings: what is lost by training in fewer bytes, on held-out data.

Of one seed all contenders have the same initial weights and batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import shardadam
from quality.stream import gpt, standard_library

FP32, BF16_PARAMS, LEAN, LEANEST = "fp32", "bf16 params, fp32 state", "lean", "leanest"
# The dtype of params, and what the optimizer is told besides.
CONFIGURATIONS: dict[str, tuple[torch.dtype, dict[str, str]]] = {
    FP32: (torch.float32, {}),
    BF16_PARAMS: (torch.bfloat16, {"master": "split"}),
    LEAN: (torch.bfloat16, {"memory": "lean"}),
    LEANEST: (torch.bfloat16, {"memory": "leanest"}),
}
BETAS = (0.9, 0.999)
WARM_UP = 0.05
"""Part of the steps."""


class Lesson(Protocol):
    """What is learned: a model, batches, and held-out data. Losses are in nats ``per`` target.

    ``lrs`` go from the usual one, ``lr``, to where hardly anything is learned.
    """

    name: str
    per: str
    steps: int
    lr: float
    lrs: tuple[float, ...]
    weight_decay: float

    def model(self) -> nn.Module:
        """Untrained, in fp32."""

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of it in batches."""


@dataclass
class Text:
    """The demo's GPT, small, on the standard library."""

    steps: int = 400
    name = "GPT on the standard library"
    per = "byte"
    lr = 3e-3
    lrs = (3e-3, 1.2e-2, 0.05, 0.1, 0.2, 0.4)
    weight_decay = 0.1
    context = 64
    held_out_bytes = 100_000

    def __post_init__(self) -> None:
        self._text = standard_library()

    def model(self) -> nn.Module:
        return gpt.GPT(2, 64, self.context, table_rows=2048)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self._text.batch(seed, step, 16, self.context)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        text = self._text.held_out[: self.held_out_bytes + 1].long()
        whole = (len(text) - 1) // self.context * self.context
        inputs, targets = (part[:whole].view(-1, self.context) for part in (text[:-1], text[1:]))
        yield from zip(inputs.split(64), targets.split(64), strict=True)


@dataclass
class Digits:
    """A small CNN on scikit-learn's 1,797 images of 8 × 8, of which 600 are held out."""

    steps: int = 400
    name = "CNN on scikit-learn's digits"
    per = "image"
    lr = 2e-3
    lrs = (2e-3, 8e-3, 3.2e-2, 0.13, 0.25, 0.5, 1.0)
    weight_decay = 0.1
    held_out_images = 600

    def __post_init__(self) -> None:
        from sklearn.datasets import load_digits

        images, classes = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self._images = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16.0
        self._classes = torch.tensor(classes)[order]

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 10)),
        )

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(self._images) - self.held_out_images, (64,), generator=generator)
        return self._images[chosen], self._classes[chosen]

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._images[-self.held_out_images :], self._classes[-self.held_out_images :]


@dataclass(frozen=True)
class Trained:
    """``loss``: held out, at the end."""

    lesson: str
    configuration: str
    lr: float
    seed: int
    loss: float


def train(lesson: Lesson, configuration: str, lr: float, seed: int) -> Trained:
    """From the beginning to the end, and measured."""
    dtype, options = CONFIGURATIONS[configuration]
    torch.manual_seed(seed)
    model = lesson.model().to(dtype)
    optimizer = shardadam.AdamW(
        model.named_parameters(),
        lr=lr,
        betas=BETAS,
        weight_decay=lesson.weight_decay,
        max_grad_norm=1.0,
        seed=seed,
        **options,
    )
    scheduler = LambdaLR(optimizer, lambda step: _factor(step, lesson.steps))
    for step in range(lesson.steps):
        _loss(model, dtype, *lesson.batch(seed, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return Trained(lesson.name, configuration, lr, seed, _held_out(model, dtype, lesson))


def run(
    lessons: Sequence[Lesson], configurations: Sequence[str], seeds: int, sweep_seeds: int
) -> list[Trained]:
    """``seeds`` trainings at each lesson's usual lr, and ``sweep_seeds`` at its others."""
    plan = [
        (lesson, configuration, lr, seed)
        for lesson in lessons
        for lr in lesson.lrs
        for seed in range(seeds if lr == lesson.lr else sweep_seeds)
        for configuration in configurations
    ]
    return [train(*one) for one in tqdm(plan, "whole trainings", unit="training")]


def _factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero, as in the demo."""
    warm_up = max(WARM_UP * steps, 1)
    return min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1), 1.0)


def _loss(model: nn.Module, dtype: torch.dtype, inputs: Tensor, targets: Tensor) -> Tensor:
    outputs = model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
    return F.cross_entropy(outputs.float().flatten(0, -2), targets.flatten())


@torch.no_grad()
def _held_out(model: nn.Module, dtype: torch.dtype, lesson: Lesson) -> float:
    total, count = 0.0, 0
    for inputs, targets in lesson.held_out():
        total += _loss(model, dtype, inputs, targets).item() * targets.numel()
        count += targets.numel()
    return total / count
