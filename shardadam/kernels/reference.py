"""The rule in plain torch operations: the specification, and the oracle of the tests.

Every operation is one of adam_update.h's, in its order, on float64 tensors (coded_state.h's, on
float32 tensors, where the state is coded). It runs on any device; it is what runs where there is no
compiled kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.kernels import coded_state, exact_sum
from shardadam.kernels.coefficients import Coefficients
from shardadam.kernels.random_bits import BLOCK, PARAM, random_bits
from shardadam.kernels.run import Run, in_memory_order

_INT16_MAX = 0x7FFF


def update(run: Run) -> None:
    """Update ``run`` in place. Equal to the compiled kernels bit for bit."""
    c = run.coefficients
    assert isinstance(c, Coefficients)
    if run.state_format != 0:
        _store(run, coded_state.update(run, _master(run), in_memory_order(run.grad)))
        return
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


def mean(shards: Sequence[Tensor], out: Tensor, divisor: int | None = None) -> None:
    """Write the mean of ``shards`` (1-D, of one dtype and length) to ``out``.

    ``out`` is float32, float64 for float64, and what sums are taken in, in the order of ``shards``.
    ``divisor``: what the sum is divided by, if not how many they are.
    """
    first, *others = shards
    out.copy_(first)
    for other in others:
        out.add_(other)
    # A tensor: by a Python number, torch on CUDA multiplies by its rounded reciprocal.
    out.div_(torch.full((), divisor or len(shards), dtype=out.dtype, device=out.device))


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
    """The float32 master weights that `split_master` split.

    Of a param that was set to zero since, zero, or the least above it: see csrc/formats.h.
    """
    return _join(param, remainder, 0)


def split8_master(master: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 master weights into bfloat16 params and int8 remainders: 24 bits of 32.

    The last 8 bits are rounded stochastically (``random``: 8 bits), the rest as in `split_master`.
    """
    bits = _stochastic(master, random, 8)
    remainder = (bits >> 8) & 0xFF
    remainder = torch.where(remainder > 0x7F, remainder - 0x100, remainder)
    param = (bits + 0x8000) >> 16
    return param.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int8)


def join8_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The 24-bit master weights that `split8_master` made, in float32."""
    return _join(param, remainder, 8)


def _join(param: Tensor, remainder: Tensor, shift: int) -> Tensor:
    bits = param.view(torch.int16).to(torch.int32)
    below_zero = (bits & 0x7FFF == 0) & (remainder < 0)
    remainder = remainder.to(torch.int32).masked_fill(below_zero, 0)
    return ((bits << 16) + (remainder << shift)).view(torch.float32)


def stochastic_param(master: Tensor, random: Tensor) -> Tensor:
    """The bfloat16 param of a master that is not kept, rounded by 16 ``random`` bits."""
    bits = _stochastic(master, random, 16) >> 16
    return bits.to(torch.int16).view(torch.bfloat16)


def _stochastic(master: Tensor, random: Tensor, width: int) -> Tensor:
    """The bits of ``master``, the last ``width`` of them rounded away by random ones.

    What is finite stays finite, and a NaN becomes a quiet one.
    """
    bits = master.view(torch.int32)
    kept = -(1 << width)
    rounded = (bits + random.int()) & kept
    overflows = (rounded & 0x7FFFFFFF) >= 0x7F800000
    rounded = torch.where(overflows, bits & kept, rounded)
    return torch.where(master.isnan(), (bits | 0x400000) & -0x10000, rounded)


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
    if run.master.dtype == torch.int8:
        return join8_master(run.param, run.master)
    # Where somebody wrote the param since the last step, the param is right.
    rounded = run.master.to(run.param.dtype)
    untouched = rounded.view(torch.int16) == run.param.view(torch.int16)
    return torch.where(untouched, run.master, run.param.float())


def _store(run: Run, value: Tensor) -> None:
    if run.master is None and run.param.dtype != torch.bfloat16:
        run.param.copy_(value)
    elif run.master is None:
        run.param.copy_(stochastic_param(value.float(), _random(run) >> 16))
    elif run.master.dtype == torch.int16:
        param, remainder = split_master(value.float())
        run.param.copy_(param)
        run.master.copy_(remainder)
    elif run.master.dtype == torch.int8:
        param, remainder = split8_master(value.float(), _random(run) >> 24)
        run.param.copy_(param)
        run.master.copy_(remainder)
    else:
        run.master.copy_(value)
        run.param.copy_(run.master)


def _random(run: Run) -> Tensor:
    """The run's random bits for its params."""
    assert isinstance(run.coefficients, Coefficients)
    numel, step = run.param.numel(), run.coefficients.step
    bits = random_bits(run.seed, step, run.first_block, -(-numel // BLOCK), PARAM)
    return bits.flatten()[:numel].to(run.param.device)
