"""Teacher-forced: all contenders get one stream's gradients, and their updates are compared."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from quality import field
from quality.contenders import Task
from quality.stream import Stream

EPS = 1e-8
RARE = 16
"""A rare embedding row is one that 1 to so many steps hit."""


@dataclass(frozen=True)
class Setting:
    """``scale`` multiplies gradients, and eps with them: fp32's updates stay what they are."""

    beta2: float = 0.999
    scale: float = 1.0

    def __str__(self) -> str:
        scaled = "" if self.scale == 1.0 else f", gradients × {self.scale:.0e}".replace("e-0", "e-")
        return f"β₂ = {self.beta2:g}{scaled}".replace("e+0", "e")


USUAL = Setting()
SWEEPS = (Setting(beta2=0.95), Setting(beta2=0.9999), Setting(scale=1e-6), Setting(scale=1e4))


@dataclass(frozen=True)
class Measured:
    """Of one contender in one setting.

    ``errors``: norm(u - u_fp32) / norm(u_fp32) of the updates u of some steps, by step; ``growth``:
    the largest abs(u) until then. ``largest``, ``largest_rare``: of all steps and elements, and of
    those in rare rows. ``bias``: of the stored roots, their sum's relative to fp32's;
    ``bias_each``: the mean over elements of the relative one; both at the end.
    """

    setting: Setting
    contender: str
    errors: Mapping[int, float]
    growth: Mapping[int, float]
    largest: float
    largest_rare: float
    bias: float
    bias_each: float

    @property
    def last(self) -> int:
        """The step at the end."""
        return max(self.errors)

    @property
    def late_error(self) -> float:
        """The median of the second half's, as one step's may be a peak."""
        return statistics.median(
            error for step, error in self.errors.items() if 2 * step > self.last
        )


class Trial:
    """The contenders in one setting; fp32, the reference, is always the first."""

    def __init__(self, setting: Setting, names: Sequence[str], stream: Stream) -> None:
        assert names[0] == field.FP32
        self._setting = setting
        task = Task(stream.shapes, beta2=setting.beta2, eps=EPS * setting.scale)
        self._contenders = {name: field.make(name, task) for name in names}
        self._largest = {name: torch.zeros(stream.numel) for name in names}
        self._errors: dict[str, dict[int, float]] = {name: {} for name in names}
        self._growth: dict[str, dict[int, float]] = {name: {} for name in names}

    def step(self, step: int, grads: Tensor, compare: bool) -> Tensor:
        """Give ``grads`` to all; returns the reference's update."""
        grads = grads * self._setting.scale
        reference = self._contenders[field.FP32].update(grads)
        for name, contender in self._contenders.items():
            update = reference.clone() if name == field.FP32 else contender.update(grads)
            if compare:
                error = torch.dist(update, reference) / reference.norm()
                self._errors[name][step] = error.item()
            largest = self._largest[name]
            torch.maximum(largest, update.abs_(), out=largest)
            if compare:
                self._growth[name][step] = largest.max().item()
        return reference

    def measured(self, rare: Tensor) -> Iterable[Measured]:
        """What came out, ``rare`` being the elements of rare rows."""
        exact = self._contenders[field.FP32].root()
        alive = exact > 0
        for name, contender in self._contenders.items():
            root, largest = contender.root(), self._largest[name]
            yield Measured(
                self._setting,
                name,
                self._errors[name],
                self._growth[name],
                largest.max().item(),
                largest[rare].max().item() if rare.any() else 0.0,
                (root.double().sum() / exact.double().sum() - 1.0).item(),
                (root[alive] / exact[alive] - 1.0).double().mean().item(),
            )


def run(
    stream: Stream, trials: Mapping[Setting, Sequence[str]], steps: int, every: int
) -> list[Measured]:
    """All ``trials`` on one stream, which the fp32 updates of the first train."""
    made = [Trial(setting, names, stream) for setting, names in trials.items()]
    with tqdm(range(1, steps + 1), "teacher-forced", unit="step") as bar:
        for step in bar:
            grads = stream.gradients()
            compare = step % every == 0 or step == steps
            first, *_ = [trial.step(step, grads, compare) for trial in made]
            stream.train(first)
            bar.set_postfix_str(f"loss {stream.loss:.2f} nats", refresh=False)
    rare = stream.rare(RARE)
    return [measured for trial in made for measured in trial.measured(rare)]
