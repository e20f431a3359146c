"""From hyperparameters and the step count to what the kernels multiply by."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """A param group's, as the rule reads them.

    ``momentum_decay`` is NAdam's (Dozat 2016), None with Adam. ``decoupled`` says how
    ``weight_decay`` acts: on the param (Loshchilov & Hutter 2019), or as L2 on the gradient. ``lr``
    is a 0-dim tensor where it is to be read on the device.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    momentum_decay: float | None = None

    def momentum(self, step: float) -> float:
        """NAdam's schedule: beta1 * (1 - 0.96^(step * momentum_decay) / 2)."""
        assert self.momentum_decay is not None
        return self.beta1 * (1.0 - 0.5 * power(0.96**self.momentum_decay, step))


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
    step: float = 0.0


def power(base: float, exponent: float) -> float:
    """``base`` to the power of a whole ``exponent``.

    By multiplications, which have the same bits on every machine; a library's pow() has not.
    """
    result = 1.0
    left = int(exponent)
    while left > 0:
        if left % 2:
            result *= base
        base *= base
        left //= 2
    return result


def fold(
    hyper: Hyperparameters, step: float, mu_product: float = 1.0, grad_factor: float = 1.0
) -> Coefficients:
    """The coefficients of step number ``step``; ``csrc/coefficients.h`` has the same operations.

    With bias corrections c1 = 1 - beta1^step and c2 = 1 - beta2^step, Adam's update is
    ``lr / c1 * m / (sqrt(v / c2) + eps)`` (Kingma & Ba 2015), and NAdam's (Dozat 2016)
    ``(lr * mu' / (1 - M * mu') * m + lr * (1 - mu) / (1 - M) * g) / (sqrt(v / c2) + eps)``, with
    the momentum mu of this step, mu' of the next, and M (``mu_product``) the product of all so far.
    ``grad_factor`` multiplies the gradient first of all.
    """
    lr = float(hyper.lr)
    root = math.sqrt(1.0 - power(hyper.beta2, step))
    grad_rate = 0.0
    if hyper.momentum_decay is not None:
        following = hyper.momentum(step + 1.0)
        exp_avg_rate = lr * following / (1.0 - mu_product * following)
        grad_rate = lr * (1.0 - hyper.momentum(step)) / (1.0 - mu_product)
    else:
        exp_avg_rate = lr / (1.0 - power(hyper.beta1, step))
    if hyper.maximize:
        grad_factor = -grad_factor
    l2 = 0.0 if hyper.decoupled else hyper.weight_decay
    folded = 1.0 if l2 else grad_factor
    return Coefficients(
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        grad_to_exp_avg=(1.0 - hyper.beta1) * folded,
        grad_to_exp_avg_sq=(1.0 - hyper.beta2) * (folded * folded),
        grad_to_update=grad_rate * root * folded,
        exp_avg_to_update=exp_avg_rate * root,
        epsilon=hyper.eps * root,
        keep=1.0 - lr * hyper.weight_decay if hyper.decoupled else 1.0,
        l2=l2,
        grad_factor=grad_factor,
        step=step,
    )
