"""Optimizers of other packages as contenders, run on the CPU by their own code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quality.contenders import Task
from quality.stream import split

State = dict[str, Any]


class Package:
    """A torch optimizer; the top of `contenders` says how it gives its updates away."""

    def __init__(
        self,
        task: Task,
        optimizer: Callable[..., torch.optim.Optimizer],
        exp_avg_sq: Callable[[State], Tensor],
    ) -> None:
        self._shapes, self._exp_avg_sq = task.shapes, exp_avg_sq
        self._flat = torch.zeros(sum(shape.numel() for shape in task.shapes))
        self._params = [torch.nn.Parameter(part) for part in split(self._flat, task.shapes)]
        self._optimizer = optimizer(
            self._params,
            lr=1.0,
            betas=(task.beta1, task.beta2),
            eps=task.eps,
            weight_decay=0.0,
        )

    def update(self, grads: Tensor) -> Tensor:
        self._flat.zero_()
        for param, grad in zip(self._params, split(grads, self._shapes), strict=True):
            param.grad = grad
        # torchao compiles its step for each shape; not compiled it has the same operations.
        with torch.compiler.set_stance("force_eager"):
            self._optimizer.step()
        return -self._flat

    def root(self) -> Tensor:
        states = (self._optimizer.state[param] for param in self._params)
        return torch.cat([self._exp_avg_sq(state).flatten() for state in states]).sqrt()


def bitsandbytes(task: Task) -> Package:
    """Dynamic 8-bit codes in blocks of 256."""
    from bitsandbytes import functional, optim

    def exp_avg_sq(state: State) -> Tensor:
        if "absmax2" not in state:  # a small param has fp32 moments
            return state["state2"]
        return functional.dequantize_blockwise(
            state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
        )

    return Package(task, optim.AdamW8bit, exp_avg_sq)


def torchao_8bit(task: Task) -> Package:
    """Nearly the same codes."""
    from torchao.optim import AdamW8bit

    return Package(task, AdamW8bit, _decoded)


def torchao_fp8(task: Task) -> Package:
    """e4m3 in blocks of 256."""
    from torchao.optim import AdamWFp8

    return Package(task, AdamWFp8, _decoded)


def _decoded(state: State) -> Tensor:
    square = state["exp_avg_sq"]
    # A small param has fp32 moments: of torch's tensors only quantized ones could be dequantized.
    return square if type(square) is Tensor else square.dequantize()
