"""What a kernel is given: runs of elements, and the coefficients they share."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What every element with the same hyperparameters and step shares.

    Fields and their folding are explained once, at ``struct Coefficients`` in
    ``csrc/adam_update.h``, whose layout this is.
    """

    beta1: float
    beta2: float
    grad_to_exp_avg: float
    grad_to_exp_avg_sq: float
    grad_to_update: float
    exp_avg_to_update: float
    epsilon: float
    keep: float
    l2: float
    grad_factor: float

    @staticmethod
    def fold(
        *,
        beta1: float,
        beta2: float,
        eps: float,
        bias_correction2: float,
        exp_avg_rate: float,
        grad_rate: float,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        grad_factor: float,
    ) -> "Coefficients":
        """From the textbook's numbers.

        The update is ``(exp_avg_rate * m + grad_rate * g) / (sqrt(v / bias_correction2) + eps)``,
        and ``grad_factor`` multiplies the gradient first of all.
        """
        root = math.sqrt(bias_correction2)
        l2 = 0.0 if decoupled else weight_decay
        folded = 1.0 if l2 else grad_factor
        return Coefficients(
            beta1=beta1,
            beta2=beta2,
            grad_to_exp_avg=(1.0 - beta1) * folded,
            grad_to_exp_avg_sq=(1.0 - beta2) * (folded * folded),
            grad_to_update=grad_rate * root * folded,
            exp_avg_to_update=exp_avg_rate * root,
            epsilon=eps * root,
            keep=1.0 - lr * weight_decay if decoupled else 1.0,
            l2=l2,
            grad_factor=grad_factor,
        )


_NO_GRAD = torch.empty(0)


@dataclass(slots=True)
class Run:
    """Contiguous elements that one set of coefficients updates; all tensors are of one length.

    ``param``: float32, float64, bfloat16 or float16. ``master``: None; an int16 remainder (bfloat16
    params: see `reference.split_master`); or the float32 master weight of a 16-bit param.
    ``grad``: float32, bfloat16 or float16; float64 with a float64 param. The moments are float32,
    float64 with a float64 param; ``max_exp_avg_sq`` makes it AMSGrad. ``grad`` may have any shape
    as long as its memory is dense.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    master: Tensor | None
    grad: Tensor
    coefficients: Coefficients
    prepared: Any = None
    """A backend's own form of the tensors that stay, made once."""

    def release(self) -> None:
        """Let go of the gradient: runs are kept from step to step, gradients must not be."""
        self.grad = _NO_GRAD


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor of any shape and strides, 1-D, in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments and reduced gradients: float64 for float64 params, else float32."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32
