"""The arguments of the CUDA kernels: structs that a launch copies.

Layouts and numbers are those of csrc/batch_cuda.h and csrc/coefficients_cuda.cu.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shardadam.kernels.coefficients import Hyperparameters

THREADS = 128
PIECES = 96
ROWS = 24
_PART = 8192
AMSGRAD, NESTEROV, L2 = 1, 2, 4  # enum Flags of csrc/formats.h


@dataclass(frozen=True, slots=True)
class Row:
    """Neighbouring spans of one group in one bucket, for `Cuda.advance`.

    ``step`` (float32), ``mu_product`` (float64, NAdam's) and the rows of ``coefficients`` (float64,
    as `Slot.table`) belong to the bucket's spans, of which ``count`` from number ``first`` on are
    meant. ``lr`` (float64, 0-dim) stands for ``hyper.lr``.
    """

    hyper: Hyperparameters
    lr: Tensor | None
    step: Tensor
    mu_product: Tensor | None
    coefficients: Tensor
    first: int
    count: int


class Pieces(ctypes.Structure):
    """Contiguous pieces of memory, cut into parts of equal length."""

    _fields_ = [
        ("values", ctypes.c_void_p * PIECES),
        ("numel", ctypes.c_int64 * PIECES),
        ("first_part", ctypes.c_uint32 * (PIECES + 1)),
        ("count", ctypes.c_int32),
    ]

    def fill(self, numels: Sequence[int]) -> int:
        """Set all but the addresses; returns the number of parts."""
        first = [0]
        for numel in numels:
            first.append(first[-1] + -(-numel // _PART))
        self.count = len(numels)
        self.numel[: self.count] = numels
        self.first_part[: self.count + 1] = first
        return first[-1]

    def point(self, tensors: Sequence[Tensor]) -> None:
        """Set the addresses."""
        self.values[: self.count] = [tensor.data_ptr() for tensor in tensors]


class Batch(ctypes.Structure):
    """What shardadam_update and shardadam_update_blocks take."""

    _fields_ = [
        ("grads", Pieces),
        ("start", ctypes.c_int64 * PIECES),
        ("first_block", ctypes.c_int64 * PIECES),
        ("coefficient", ctypes.c_int32 * PIECES),
        ("param", ctypes.c_void_p),
        ("master", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("max_exp_avg_sq", ctypes.c_void_p),
        ("exp_avg_scale", ctypes.c_void_p),
        ("exp_avg_sq_scale", ctypes.c_void_p),
        ("max_exp_avg_sq_scale", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("skip", ctypes.c_void_p),
        ("seed", ctypes.c_int64),
    ]


class _Hyperparameters(ctypes.Structure):
    _fields_ = [
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("momentum_decay", ctypes.c_double),
        ("decoupled", ctypes.c_int32),
        ("maximize", ctypes.c_int32),
        ("nesterov", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class _Row(ctypes.Structure):
    _fields_ = [
        ("hyper", _Hyperparameters),
        ("lr", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("mu_product", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("first", ctypes.c_int32),
        ("count", ctypes.c_int32),
    ]


class Rows(ctypes.Structure):
    """What shardadam_advance takes."""

    _fields_ = [
        ("row", _Row * ROWS),
        ("factor", ctypes.c_void_p),
        ("skip", ctypes.c_void_p),
    ]


def row_of(row: Row) -> _Row:
    """A row as the kernel takes it."""
    hyper, decay = row.hyper, row.hyper.momentum_decay
    return _Row(
        hyper=_Hyperparameters(
            lr=0.0 if isinstance(hyper.lr, Tensor) else hyper.lr,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
            momentum_decay=0.0 if decay is None else 0.96**decay,
            decoupled=hyper.decoupled,
            maximize=hyper.maximize,
            nesterov=decay is not None,
        ),
        lr=pointer(row.lr),
        step=pointer(row.step),
        mu_product=pointer(row.mu_product),
        coefficients=row.coefficients.data_ptr(),
        first=row.first,
        count=row.count,
    )


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor lies on the device."""
    return None if tensor is None else tensor.data_ptr()
