"""What a kernel is given: runs of elements, and the coefficients they share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardadam.kernels.coefficients import Coefficients


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Coefficients that are folded on the device: row ``index`` of ``table``.

    ``table``: float64, (any number, 11), in the order of `Coefficients`. ``nesterov`` and ``l2``:
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
    (torch.bfloat16, torch.int8): 5,
    (torch.bfloat16, None): 6,
}
# enum StateFormat, by the dtypes of exp_avg and exp_avg_sq
STATE_FORMATS = {
    (torch.float32, torch.float32): 0,
    (torch.float64, torch.float64): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.int8, torch.int16): 2,
    (torch.int8, torch.uint8): 3,
}
CODED = (2, 3)  # of them, those with scales
GRAD_FORMATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_NO_GRAD = torch.empty(0)


@dataclass(slots=True)
class Run:
    """Contiguous elements that one set of coefficients updates; all tensors are of one length.

    ``param``: float32, float64, bfloat16 or float16. ``master``: None (bfloat16 params are then
    rounded stochastically); an int16 or int8 remainder (bfloat16 params: see
    `reference.split_master` and `reference.split8_master`); or the float32 master weight of a
    16-bit param. ``grad``: float32, bfloat16 or float16; float64 with a float64 param. The moments
    are float32, float64 with a float64 param, or coded (`coded_state`): both bfloat16, or
    ``exp_avg`` int8 and ``exp_avg_sq`` int16 or uint8 with a bfloat16 scale per block of 128
    elements. ``max_exp_avg_sq`` makes it AMSGrad. ``grad`` may have any shape as long as its memory
    is dense. ``coefficients`` are a `Slot` where the backend folds them.

    What is coded or rounded stochastically goes by blocks: the run starts with block number
    ``first_block`` of all that share ``seed``.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    master: Tensor | None
    grad: Tensor
    coefficients: Coefficients | Slot
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    max_exp_avg_sq_scale: Tensor | None = None
    first_block: int = 0
    seed: int = 0
    prepared: Any = None
    """A backend's own form of the tensors that stay, made once."""

    @property
    def param_format(self) -> int | None:
        """The code of the dtypes of param and master; None if no kernel knows them."""
        master = None if self.master is None else self.master.dtype
        return PARAM_FORMATS.get((self.param.dtype, master))

    @property
    def state_format(self) -> int | None:
        """The code of the dtypes of the moments; None if no kernel knows them."""
        return STATE_FORMATS.get((self.exp_avg.dtype, self.exp_avg_sq.dtype))

    @property
    def by_blocks(self) -> bool:
        """Whether state is coded or a param is rounded stochastically."""
        return self.state_format != 0 or self.param_format in (5, 6)

    @property
    def no_kernel(self) -> str:
        """The error for dtypes that no kernel exists for."""
        master = "no master" if self.master is None else f"a {self.master.dtype} master"
        return (
            f"no kernel for {self.param.dtype} params with {master} and {self.grad.dtype} "
            f"gradients, exp_avg in {self.exp_avg.dtype} and exp_avg_sq in {self.exp_avg_sq.dtype}"
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
