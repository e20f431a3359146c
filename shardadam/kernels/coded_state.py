"""State in fewer bytes, in plain torch: the specification of csrc/coded_state.h.

``docs/low_memory.md`` defines the formats and derives their bounds. A block is 128 elements of a
param; every function here takes and gives ``(blocks, 128)``, the last block padded with zeros. All
arithmetic is one float32 operation after the other, correctly rounded.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.kernels.coefficients import Coefficients
from shardadam.kernels.random_bits import BLOCK, STATE, random_bits
from shardadam.kernels.run import Run

BITS = {torch.int16: 16, torch.uint8: 8}  # of the code of exp_avg_sq, by the dtype that holds it
_RATIO_CODES = 127.0
_LEAST_RATIO = 2.0**-100  # a block whose ratios are smaller has no exp_avg
_LARGEST_GRAD = 2.0**60
_LARGEST_FLOAT = torch.finfo(torch.float32).max
_LARGEST_SQUARE = 2.0**126
_LEAST_DIVISOR = 2.0**-80  # less than any root that is not 0


@dataclass(frozen=True, slots=True)
class Single:
    """`Coefficients` for arithmetic in float32; every field is a float32.

    Betas are rounded to float32, and what is new is weighted with exactly the rest to 1. What is
    nearer to 1 is held by its distance from 1, which float32 has to 24 bits. As in `Coefficients`,
    the gradient's factor is folded into what the gradient is multiplied by anyway, unless L2 decay
    comes between.
    """

    grad_factor: float  # with L2 decay
    l2: float
    largest_grad: float  # a gradient is limited to it, after L2 decay
    beta1: float
    beta2: float
    grad_to_exp_avg: float
    grad_to_root: float  # its square: to exp_avg_sq
    grad_to_update: float
    exp_avg_to_update: float
    epsilon: float
    decay: float  # 1 - keep
    stalls: float  # codes of the ratio below this would not decay if they were rounded to nearest

    @classmethod
    def of(cls, c: Coefficients) -> "Single":
        """Rounded to float32 once, from float64."""
        beta1, beta2 = (min(_float32(beta), 1.0 - 2.0**-24) for beta in (c.beta1, c.beta2))
        folded = 1.0 if c.l2 else c.grad_factor
        limited = abs(folded) * _LARGEST_FLOAT > _LARGEST_GRAD
        values = (
            *(c.grad_factor, c.l2, _LARGEST_GRAD / abs(folded) if limited else _LARGEST_FLOAT),
            *(beta1, beta2, (1.0 - beta1) * folded, math.sqrt(1.0 - beta2) * folded),
            *(c.grad_to_update, c.exp_avg_to_update, c.epsilon),
            *(1.0 - c.keep, 0.5 / (1.0 - c.beta1)),
        )
        return cls(*map(_float32, values))


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()


def update(run: Run, param: Tensor, grad: Tensor) -> Tensor:
    """Update the coded state of ``run``; returns its new master weights.

    ``param`` and ``grad`` are 1-D. Where a gradient is not finite, the param becomes NaN and the
    state is that of a gradient of zero: NaN has no code, and a block's scale is of all its
    elements.
    """
    shared = run.coefficients
    assert isinstance(shared, Coefficients)
    c = Single.of(shared)
    numel = param.numel()
    param, given = blocks_of(param.float()), blocks_of(grad.float())
    finite = given.isfinite()
    grad = torch.where(finite, given, 0.0)
    if shared.l2:
        grad = c.grad_factor * grad + c.l2 * param
        grad = torch.where(grad.isnan(), 0.0, grad)
    grad = grad.clamp(-c.largest_grad, c.largest_grad)
    exp_avg, square = _decode_moments(run)
    exp_avg = c.beta1 * exp_avg + c.grad_to_exp_avg * grad
    square = c.beta2 * square + (c.grad_to_root * grad).square()
    square = square.clamp(max=_LARGEST_SQUARE)
    alive = square > 0
    exp_avg = torch.where(alive, exp_avg, 0.0)
    bits = random_bits(run.seed, shared.step, run.first_block, len(param), STATE).to(param.device)
    divisor = _code(run, exp_avg, square, bits, c.stalls)
    numerator = c.exp_avg_to_update * exp_avg
    if shared.grad_to_update:
        numerator = numerator + c.grad_to_update * torch.where(alive, grad, 0.0)
    change = numerator / (divisor.clamp(min=_LEAST_DIVISOR) + c.epsilon)
    param = torch.where(finite, param - (change + c.decay * param), torch.nan)
    return param.flatten()[:numel]


def _decode_moments(run: Run) -> tuple[Tensor, Tensor]:
    """The first moment and the square, decoded."""
    if run.exp_avg_sq.dtype == torch.bfloat16:
        return blocks_of(run.exp_avg.float()), blocks_of(run.exp_avg_sq.float())
    assert run.exp_avg_scale is not None and run.exp_avg_sq_scale is not None
    root = decode_root(blocks_of(run.exp_avg_sq), run.exp_avg_sq_scale)
    return decode_ratio(blocks_of(run.exp_avg), run.exp_avg_scale, root), root * root


def _code(run: Run, exp_avg: Tensor, square: Tensor, bits: Tensor, stalls: float) -> Tensor:
    """Store the moments as codes; returns what the update divides by, before epsilon."""
    root = sqrt(square)
    if run.exp_avg_sq.dtype == torch.bfloat16:
        put(run.exp_avg, exp_avg.bfloat16())
        put(run.exp_avg_sq, stochastic_bf16(square, bits >> 16))
        if run.max_exp_avg_sq is None:
            return root
        largest = torch.maximum(square, blocks_of(run.max_exp_avg_sq.float()))
        put(run.max_exp_avg_sq, bf16_up(largest))
        return sqrt(largest)
    width = BITS[run.exp_avg_sq.dtype]
    assert run.exp_avg_scale is not None and run.exp_avg_sq_scale is not None
    codes, scale = code_root(root, bits >> 16, width)
    put(run.exp_avg_sq, codes)
    run.exp_avg_sq_scale.copy_(scale)
    ratio = exp_avg / root.clamp(min=_LEAST_DIVISOR)
    codes, scale = code_ratio(ratio, bits & 0xFFFF, stalls)
    put(run.exp_avg, codes)
    run.exp_avg_scale.copy_(scale)
    if run.max_exp_avg_sq is None:
        return root
    assert run.max_exp_avg_sq_scale is not None
    before = decode_root(blocks_of(run.max_exp_avg_sq), run.max_exp_avg_sq_scale)
    largest = torch.maximum(root, before)
    codes, scale = code_maximum(largest, width)
    put(run.max_exp_avg_sq, codes)
    run.max_exp_avg_sq_scale.copy_(scale)
    return largest


# ---- codes of the root --------------------------------------------------------------------------


def code_root(root: Tensor, random: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Codes of ``width`` bits (16: int16, 8: uint8) and scales (bfloat16), a scale per block.

    ``random``: 16 bits per element, for stochastic rounding.
    """
    if width == 16:
        scale = bf16_up(root.amax(1))
        code = (root.view(torch.int32) - _zero16(scale) + (random >> 4).int()) >> 12
        return _stored(_at_least(root, code), width), scale
    scale = bf16_up(_enough8(root))
    place = sqrt(root) * _over(256.0, sqrt(scale.float()))[:, None]
    below = place.floor()
    beyond = place - below
    # A step is so wide that the square, a code's fourth power, would grow by rounding: the chance
    # of the upper code is such that the square's expected value is right to first order.
    chance = (random.float() * 2.0**-16) * (below + 1.5)
    code = below + (chance < beyond * (below + 1.5 * beyond)).float()
    return _stored(_at_least(root, code.int()), width), scale


def code_maximum(root: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As `code_root`, with codes that never decode to less than ``root``."""
    if width == 16:
        scale = bf16_up(root.amax(1))
        code = (root.view(torch.int32) - _zero16(scale) + 0xFFF) >> 12
        return _stored(_at_least(root, code), width), scale
    # A power of two: each change of it rounds all of a block up once more.
    bits = (_enough8(root).view(torch.int32) + 0x7FFFFF) & 0x7F800000
    scale = bits.view(torch.float32).bfloat16()
    code = (sqrt(root) * _over(256.0, sqrt(scale.float()))[:, None] + 0.5).floor()
    code = code + (_decode8(code, scale) < root).float()
    return _stored(code.int(), width), scale


def decode_root(codes: Tensor, scale: Tensor) -> Tensor:
    """The root of the square that a code stands for."""
    if BITS[codes.dtype] == 8:
        return _decode8(codes.float(), scale)
    code = codes.int() & 0xFFFF
    bits = torch.where(code > 0, _zero16(scale) + (code << 12), 0)
    return bits.view(torch.float32)


def _decode8(code: Tensor, scale: Tensor) -> Tensor:
    return (code * code) * (scale.float()[:, None] * 2.0**-16)


def _enough8(root: Tensor) -> Tensor:
    """What a scale must be at least for codes to stay under 256."""
    return root.amax(1) * (1.0 + 3.0 / 256.0)


def _zero16(scale: Tensor) -> Tensor:
    """The bits that a code of 16 bits counts from: 65,535 steps under the scale."""
    return ((scale.view(torch.int16).int() << 16) - (0xFFFF << 12))[:, None]


def _at_least(root: Tensor, code: Tensor) -> Tensor:
    """Code 0 for 0 and for nothing else."""
    return torch.where(root > 0, code.clamp(min=1), 0)


def _stored(code: Tensor, width: int) -> Tensor:
    if width == 8:
        return code.to(torch.uint8)
    return torch.where(code > 0x7FFF, code - 0x10000, code).to(torch.int16)


# ---- codes of the ratio -------------------------------------------------------------------------


def code_ratio(ratio: Tensor, random: Tensor, stalls: float) -> tuple[Tensor, Tensor]:
    """Codes (int8) and scales (bfloat16) of exp_avg over the root.

    To nearest, but stochastically (``random``: 16 bits) below ``stalls``.
    """
    scale = bf16_up(ratio.abs().amax(1) * (1.0 + 2.0**-14))
    scale = torch.where(scale.float() >= _LEAST_RATIO, scale, torch.zeros_like(scale))
    place = ratio * _over(_RATIO_CODES, scale.float())[:, None]
    offset = torch.where(place.abs() < stalls, 128.0 + random.float() * 2.0**-16, 128.5)
    return ((place + offset).floor() - 128.0).to(torch.int8), scale


def decode_ratio(codes: Tensor, scale: Tensor, root: Tensor) -> Tensor:
    """The first moment: ``root * scale * code / 127``."""
    unit = scale.float() * torch.tensor(1.0 / _RATIO_CODES, dtype=torch.float32).item()
    return root * (codes.float() * unit[:, None])


# ---- numbers ------------------------------------------------------------------------------------


def bf16_up(value: Tensor) -> Tensor:
    """The least bfloat16 that is not less than ``value``, which is not negative."""
    bits = (value.view(torch.int32) + 0xFFFF) >> 16
    return bits.to(torch.int16).view(torch.bfloat16)


def stochastic_bf16(value: Tensor, random: Tensor) -> Tensor:
    """One of the two nearest bfloat16s of ``value`` (not negative), 0 only for 0.

    The expected value is exact. ``random``: 16 bits.
    """
    bits = (value.view(torch.int32) + random.int()) >> 16
    bits = torch.where((value > 0) & (bits < 1), 1, bits)
    return bits.to(torch.int16).view(torch.bfloat16)


def sqrt(value: Tensor) -> Tensor:
    """The correctly rounded root, as no 24 bits have a root that double rounding gets wrong."""
    return value.double().sqrt().float()


def _over(number: float, values: Tensor) -> Tensor:
    """``number / values``, 0 for 0; of a number, torch multiplies by the rounded reciprocal."""
    return torch.where(values > 0, torch.full_like(values, number) / values, 0.0)


def blocks_of(values: Tensor) -> Tensor:
    """A run's elements, a block a row, the last one filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)


def put(stored: Tensor, values: Tensor) -> None:
    """Write blocks back to a run's elements."""
    stored.copy_(values.flatten()[: stored.numel()])
