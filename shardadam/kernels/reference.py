"""The rule in plain torch operations: the specification, and the oracle of the tests.

Every operation is one of adam_update.h's, in its order, on float64 tensors. It runs on any device;
it is what runs where there is no compiled kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.kernels import exact_sum
from shardadam.kernels.coefficients import Coefficients
from shardadam.kernels.run import Run, in_memory_order

_INT16_MAX = 0x7FFF


def update(run: Run) -> None:
    """Update ``run`` in place. Equal to the compiled kernels bit for bit."""
    c = run.coefficients
    assert isinstance(c, Coefficients)
    param = _master(run).double()
    grad = in_memory_order(run.grad).double()
    if c.l2:
        grad = c.grad_factor * grad + c.l2 * param
    exp_avg = c.beta1 * run.exp_avg.double() + c.grad_to_exp_avg * grad
    exp_avg_sq = c.beta2 * run.exp_avg_sq.double() + c.grad_to_exp_avg_sq * (grad * grad)
    square = exp_avg_sq
    if run.max_exp_avg_sq is not None:
        square = torch.maximum(exp_avg_sq, run.max_exp_avg_sq.double())
        run.max_exp_avg_sq.copy_(square)
    numerator = c.exp_avg_to_update * exp_avg
    if c.grad_to_update:
        numerator = numerator + c.grad_to_update * grad
    run.exp_avg.copy_(exp_avg)
    run.exp_avg_sq.copy_(exp_avg_sq)
    _store(run, c.keep * param - numerator / (_sqrt(square) + c.epsilon))


def sum_squares(values: Tensor, words: Tensor) -> None:
    """Add the squares of ``values`` to the exact sum ``words``.

    Blocks of 128 are summed by halving in float64, their sums exactly.
    """
    flat = in_memory_order(values).double()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % exact_sum.BLOCK))
    sums = blocks.square_().view(-1, exact_sum.BLOCK)
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    exact_sum.add(words, sums.flatten())


def mean(shards: Sequence[Tensor], out: Tensor) -> None:
    """Write the mean of ``shards`` (1-D, of one dtype and length) to ``out``.

    ``out`` is float32, float64 for float64, and what sums are taken in, in the order of ``shards``.
    """
    first, *others = shards
    out.copy_(first)
    for other in others:
        out.add_(other)
    # A tensor: by a Python number, torch on CUDA multiplies by its rounded reciprocal.
    out.div_(torch.full((), len(shards), dtype=out.dtype, device=out.device))


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 master weights into bfloat16 params and int16 remainders, exactly.

    ``bits(master) == (bits(param) << 16) + remainder``: the param is the master rounded to nearest,
    ties away from zero (with ties to even 16 bits would not be enough). A NaN stays a NaN.
    """
    bits = master.view(torch.int32)
    bits = torch.where(master.isnan(), (bits | 0x400000) & -0x10000, bits)
    remainder = bits & 0xFFFF
    remainder = torch.where(remainder > _INT16_MAX, remainder - 0x10000, remainder)
    # int32 wraps around here as the hardware does; the shift keeps the sign.
    param = (bits + 0x8000) >> 16
    return param.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master weights that `split_master` split."""
    bits = (param.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def _sqrt(square: Tensor) -> Tensor:
    """The correctly rounded square root; torch's on CPU is one ulp off in 1 % of the cases.

    One Newton step, with the residual made exact by splitting the root in halves (Dekker 1971).
    """
    root = square.sqrt()
    scaled = root * (2.0**27 + 1.0)
    high = scaled - (scaled - root)
    low = root - high
    residual = ((square - high * high) - 2.0 * high * low) - low * low
    regular = (root > 0) & root.isfinite()
    return torch.where(regular, root + residual / (2.0 * root), root)


def _master(run: Run) -> Tensor:
    if run.master is None:
        return run.param
    if run.master.dtype == torch.int16:
        return join_master(run.param, run.master)
    # Where somebody wrote the param since the last step, the param is right.
    rounded = run.master.to(run.param.dtype)
    untouched = rounded.view(torch.int16) == run.param.view(torch.int16)
    return torch.where(untouched, run.master, run.param.float())


def _store(run: Run, value: Tensor) -> None:
    if run.master is None:
        run.param.copy_(value)
    elif run.master.dtype == torch.int16:
        param, remainder = split_master(value.float())
        run.param.copy_(param)
        run.master.copy_(remainder)
    else:
        run.master.copy_(value)
        run.param.copy_(run.master)
