"""The fused update and the gradient norm: the backends, and the one that a device gets.

Which `Backend` runs is decided once, by `backend_for`, and shown by ``repr(optimizer)``. Kernels
know tensors and numbers, not parameters.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shardadam.kernels import cpu, cuda, cuda_driver, exact_sum, reference
from shardadam.kernels.coefficients import Coefficients, Hyperparameters, fold
from shardadam.kernels.cuda_arguments import Row
from shardadam.kernels.run import Run, Slot

__all__ = [
    "Backend",
    "Coefficients",
    "Hyperparameters",
    "OnHost",
    "Row",
    "Run",
    "Slot",
    "backend_for",
    "fold",
    "supports",
]


class Backend(Protocol):
    """What computes.

    ``folds_on_device``: it has `Cuda.advance`, which counts steps and folds coefficients where the
    params are, and `update` can be told on the device to skip.
    """

    @property
    def folds_on_device(self) -> bool:
        """See above."""

    @property
    def name(self) -> str:
        """What it is, for the user."""

    def prepare(self, runs: Sequence[Run]) -> None:
        """Make sure that `update` can take ``runs``; nothing has been changed if it raises."""

    def update(self, runs: Sequence[Run], skip: Tensor | None = None) -> None:
        """Update every run in place."""

    def sum_squares(self, values: Sequence[Tensor], words: Tensor) -> None:
        """Add the squares of all ``values`` to an exact sum (`kernels.exact_sum`)."""

    def root(self, words: Tensor) -> Tensor:
        """The square root of an exact sum, a 0-dim float64 tensor on its device."""

    def mean(self, shards: Sequence[Tensor], out: Tensor, divisor: int | None = None) -> None:
        """Write the mean of the ranks' ``shards`` to ``out``, as `reference.mean`."""


@dataclass(frozen=True)
class _Reference:
    name: str
    folds_on_device: bool = False

    def prepare(self, runs: Sequence[Run]) -> None:
        pass

    def update(self, runs: Sequence[Run], skip: Tensor | None = None) -> None:
        assert skip is None, "the host knows, and calls this or not"
        for run in runs:
            reference.update(run)

    def sum_squares(self, values: Sequence[Tensor], words: Tensor) -> None:
        for tensor in values:
            reference.sum_squares(tensor, words)

    def root(self, words: Tensor) -> Tensor:
        return torch.tensor(exact_sum.root(words), dtype=torch.float64, device=words.device)

    def mean(self, shards: Sequence[Tensor], out: Tensor, divisor: int | None = None) -> None:
        reference.mean(shards, out, divisor)


class OnHost:
    """Updates what has been brought to the host, and measures gradients where they are.

    Args:
        host: updates, in the thread that calls it.
        device: the rest.
    """

    folds_on_device = False

    def __init__(self, host: Backend, device: Backend) -> None:
        self._host = host
        self.name = f"{host.name} on the host, norms by {device.name}"
        self.sum_squares, self.root, self.mean = device.sum_squares, device.root, device.mean

    def prepare(self, runs: Sequence[Run]) -> None:
        """Nothing: what runs on the host needs no loading."""

    def update(self, runs: Sequence[Run], skip: Tensor | None = None) -> None:
        """As in `Backend`."""
        self._host.update(runs, skip)


def backend_for(device: torch.device, threads: int | None = None) -> Backend:
    """The backend for one optimizer: compiled kernels on CPU and CUDA, else torch operations.

    All give the same bits; the kernels are faster by more than an order of magnitude. ``threads``:
    see `cpu.Twin`.

    Raises:
        ValueError: a GPU that is too old.
    """
    if device.type == "cpu":
        library, why_not = cpu.load()
        if library is not None:
            return cpu.Twin(library, threads)
    elif device.type == "cuda" and torch.version.hip is None:
        kernels, why_not = cuda_driver.load(device)
        if kernels is not None:
            return cuda.Cuda(kernels)
    else:
        return _Reference(f"torch operations on {device.type} (no {device.type} kernel)")
    _warn_once(why_not)
    return _Reference(f"torch operations on {device.type} ({why_not})")


@functools.cache
def _warn_once(why_not: str) -> None:
    warnings.warn(f"shardadam updates in torch operations, which is slow: {why_not}", stacklevel=3)


def supports(dtype: torch.dtype) -> bool:
    """Whether params of (real) ``dtype`` can be updated."""
    return dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
