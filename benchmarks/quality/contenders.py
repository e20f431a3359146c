"""Who keeps Adam's moments in fewer bytes: ours, and published ones whose formula is enough.

Every contender has the same task: gradients in, ``m_hat / (sqrt(v_hat) + eps)`` out. An optimizer
gives it away if its params are zero, its lr is 1 and its weight decay 0: what they then become is
minus the update, to the last bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quality.stream import split
from shardadam.kernels import Hyperparameters, Run, backend_for, coded_state, fold

BLOCK = 128
# The dtypes of exp_avg and exp_avg_sq.
STATES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "q16": (torch.int8, torch.int16),
    "q8": (torch.int8, torch.uint8),
}


@dataclass(frozen=True)
class Task:
    """What a contender is made for."""

    shapes: Sequence[torch.Size]
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class Contender(Protocol):
    """All tensors hold all params, one after another."""

    def update(self, grads: Tensor) -> Tensor:
        """This step's."""

    def root(self) -> Tensor:
        """Of exp_avg_sq as it is stored."""


class Ours:
    """This package's kernel, on state of one of its formats."""

    def __init__(self, task: Task, state: str) -> None:
        self._backend = backend_for(torch.device("cpu"))
        self._hyper = Hyperparameters(
            lr=1.0,
            beta1=task.beta1,
            beta2=task.beta2,
            eps=task.eps,
            weight_decay=0.0,
            decoupled=True,
            maximize=False,
        )
        self._step = 0
        averages, squares = STATES[state]
        self._param = torch.zeros(sum(shape.numel() for shape in task.shapes))
        self._shapes = [torch.Size([shape.numel()]) for shape in task.shapes]
        self._runs = []
        first_block = 0
        for param in split(self._param, self._shapes):
            blocks = -(-len(param) // BLOCK)
            scales = [
                torch.zeros(blocks, dtype=torch.bfloat16) if state in ("q16", "q8") else None
                for _ in range(2)
            ]
            run = Run(
                param,
                torch.zeros(len(param), dtype=averages),
                torch.zeros(len(param), dtype=squares),
                None,
                None,
                torch.empty_like(param),
                fold(self._hyper, 1.0),
                exp_avg_scale=scales[0],
                exp_avg_sq_scale=scales[1],
                first_block=first_block,
            )
            self._runs.append(run)
            first_block += blocks
        self._backend.prepare(self._runs)

    def update(self, grads: Tensor) -> Tensor:
        self._step += 1
        self._param.zero_()
        for run, grad in zip(self._runs, split(grads, self._shapes), strict=True):
            run.grad = grad
            run.coefficients = fold(self._hyper, float(self._step))
        self._backend.update(self._runs)
        return -self._param

    def root(self) -> Tensor:
        return torch.cat([_root_of(run) for run in self._runs])


def _root_of(run: Run) -> Tensor:
    if run.exp_avg_sq_scale is None:
        return run.exp_avg_sq.float().sqrt()
    codes = coded_state.blocks_of(run.exp_avg_sq)
    return coded_state.decode_root(codes, run.exp_avg_sq_scale).flatten()[: len(run.param)]


class Rounded:
    """Adam in fp32, whose moments lose after each step what a format can't hold."""

    def __init__(self, task: Task, lose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._task, self._lose, self._step = task, lose, 0
        self._exp_avg = torch.zeros(sum(shape.numel() for shape in task.shapes))
        self._exp_avg_sq = torch.zeros_like(self._exp_avg)

    def update(self, grads: Tensor) -> Tensor:
        task, self._step = self._task, self._step + 1
        exp_avg = self._exp_avg.lerp(grads, 1.0 - task.beta1)
        exp_avg_sq = self._exp_avg_sq.lerp(grads.square(), 1.0 - task.beta2)
        root = (exp_avg_sq / (1.0 - task.beta2**self._step)).sqrt_()
        update = exp_avg / (1.0 - task.beta1**self._step) / root.add_(task.eps)
        self._exp_avg, self._exp_avg_sq = self._lose(exp_avg, exp_avg_sq)
        return update

    def root(self) -> Tensor:
        return self._exp_avg_sq.sqrt()


def bf16(exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
    """Both to nearest, as in optimizers that make their state in the dtype of bf16 params."""
    return exp_avg.bfloat16().float(), exp_avg_sq.bfloat16().float()


def companded(exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
    """FlashOptim's: groups of 32 with scales in fp16, 8-bit codes of softsign(m) and of sqrt(v).

    Its groups end with a param: here all params' sizes are multiples of 32.
    """
    average, scale = _grouped(exp_avg)
    code = (254.0 * average / (1.0 + average.abs()) + 0.5).floor() / 127.0
    decoded = code / (2.0 - code.abs()) * scale
    root, root_scale = _grouped(exp_avg_sq.sqrt())
    decoded_root = (255.0 * root + 0.5).floor() / 255.0 * root_scale
    return decoded.flatten()[: len(exp_avg)], decoded_root.square().flatten()[: len(exp_avg)]


def _grouped(values: Tensor) -> tuple[Tensor, Tensor]:
    """Relative to the largest of each group of 32, and that as its scale in fp16."""
    groups = torch.nn.functional.pad(values, (0, -len(values) % 32)).view(-1, 32)
    largest = groups.abs().amax(1, keepdim=True).clamp_(min=1e-12)
    return groups / largest, largest.half().float()
