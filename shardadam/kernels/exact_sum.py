"""Exact sums of doubles, so that a norm does not depend on who added what first.

A sum is ``WORDS`` int64 words: 68 limbs, limb k worth 2^(32k - 1074), then a count of infinities
and a count of NaNs. Sums of sums are plain integer additions, also those of an all-reduce, and
2^31 terms fit. The idea is that of superaccumulators (Kulisch 1971; Neal 2015).
"""

import math

import torch
from torch import Tensor

LIMBS = 68
WORDS = LIMBS + 2
BLOCK = 128
_SMALLEST_EXPONENT = -1074


def zero(device: torch.device | str = "cpu") -> Tensor:
    """The empty sum."""
    return torch.zeros(WORDS, dtype=torch.int64, device=device)


def add(words: Tensor, values: Tensor) -> None:
    """Add non-negative float64 ``values`` (1-D) to ``words``, exactly."""
    finite = torch.isfinite(values)
    words[LIMBS] += values.isinf().sum()
    words[LIMBS + 1] += values.isnan().sum()
    bits = values[finite].view(torch.int64)
    exponent = (bits >> 52) & 0x7FF
    significand = (bits & ((1 << 52) - 1)) | (exponent > 0).to(torch.int64) << 52
    position = (exponent - 1).clamp_(min=0)
    limb, shift = position // 32, position % 32
    low = (significand & 0xFFFFFFFF) << shift
    high = (significand >> 32) << shift
    words.index_add_(0, limb, low & 0xFFFFFFFF)
    words.index_add_(0, limb + 1, (low >> 32 & 0xFFFFFFFF) + (high & 0xFFFFFFFF))
    words.index_add_(0, limb + 2, high >> 32)


def root(words: Tensor) -> float:
    """The square root of a sum, the sum rounded once."""
    *limbs, infinities, nans = words.tolist()
    if nans:
        return math.nan
    if infinities:
        return math.inf
    total = sum(limb << (32 * index) for index, limb in enumerate(limbs))
    try:
        return math.sqrt(total / (1 << -_SMALLEST_EXPONENT))
    except OverflowError:
        return math.inf
