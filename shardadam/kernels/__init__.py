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

from shardadam.kernels import cpu, reference
from shardadam.kernels.run import Coefficients, Run

__all__ = ["Backend", "Coefficients", "Run", "backend_for", "supports"]


class Backend(Protocol):
    """What computes."""

    @property
    def name(self) -> str:
        """What it is, for the user."""

    def update(self, runs: Sequence[Run]) -> None:
        """Update every run in place."""

    def sum_squares(self, values: Tensor, words: Tensor) -> None:
        """Add the squares of ``values`` to an exact sum (`kernels.exact_sum`)."""


@dataclass(frozen=True)
class _Reference:
    name: str

    def update(self, runs: Sequence[Run]) -> None:
        for run in runs:
            reference.update(run)

    def sum_squares(self, values: Tensor, words: Tensor) -> None:
        reference.sum_squares(values, words)


@functools.cache
def backend_for(device_type: str) -> Backend:
    """The backend for tensors on ``device_type``: the compiled twin on CPU, else torch operations.

    Both give the same bits; the twin is faster by more than an order of magnitude.
    """
    if device_type == "cpu":
        library, why_not = cpu.load()
        if library is not None:
            return cpu.Twin(library)
        warnings.warn(
            f"shardadam updates in torch operations, which is slow: {why_not}", stacklevel=2
        )
        return _Reference(f"torch operations on CPU ({why_not})")
    return _Reference(f"torch operations on {device_type} (no {device_type} kernel yet)")


def supports(dtype: torch.dtype) -> bool:
    """Whether params of (real) ``dtype`` can be updated."""
    return dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
