"""What a kernel is given: runs of elements, and the coefficients they share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardadam.kernels.coefficients import Coefficients


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Coefficients that are folded on the device: row ``index`` of ``table``.

    ``table``: float64, (any number, 10), in the order of `Coefficients`. ``nesterov`` and ``l2``:
    which terms of the rule they use, which the host has to know.
    """

    table: Tensor
    index: int
    nesterov: bool
    l2: bool


# enum ParamFormat, by the dtypes of param and master, and enum GradFormat of csrc/formats.h
PARAM_FORMATS = {
    (torch.float32, None): 0,
    (torch.float64, None): 1,
    (torch.bfloat16, torch.int16): 2,
    (torch.bfloat16, torch.float32): 3,
    (torch.float16, torch.float32): 4,
}
GRAD_FORMATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_NO_GRAD = torch.empty(0)


@dataclass(slots=True)
class Run:
    """Contiguous elements that one set of coefficients updates; all tensors are of one length.

    ``param``: float32, float64, bfloat16 or float16. ``master``: None; an int16 remainder (bfloat16
    params: see `reference.split_master`); or the float32 master weight of a 16-bit param.
    ``grad``: float32, bfloat16 or float16; float64 with a float64 param. The moments are float32,
    float64 with a float64 param; ``max_exp_avg_sq`` makes it AMSGrad. ``grad`` may have any shape
    as long as its memory is dense. ``coefficients`` are a `Slot` where the backend folds them.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    master: Tensor | None
    grad: Tensor
    coefficients: Coefficients | Slot
    prepared: Any = None
    """A backend's own form of the tensors that stay, made once."""

    @property
    def param_format(self) -> int | None:
        """The code of the dtypes of param and master; None if no kernel knows them."""
        master = None if self.master is None else self.master.dtype
        return PARAM_FORMATS.get((self.param.dtype, master))

    @property
    def no_kernel(self) -> str:
        """The error for dtypes that no kernel exists for."""
        master = "no master" if self.master is None else f"a {self.master.dtype} master"
        return (
            f"no kernel for {self.param.dtype} params with {master} and {self.grad.dtype} gradients"
        )

    def release(self) -> None:
        """Let go of the gradient: runs are kept from step to step, gradients must not be."""
        self.grad = _NO_GRAD


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor of any shape and strides, 1-D, in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments and reduced gradients: float64 for float64 params, else float32."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32
