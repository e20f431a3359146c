"""Digests of what is in memory, block by block, to find bits that have changed.

The bits of each block of ALIGNMENT elements are summed as 64-bit integers: one number per block,
at the speed of memory, where a CRC of all bytes takes three to five times as long
(docs/corruption.md). One flipped bit changes its block's sum by a power of two, so it is always
seen; so are all changes but those that cancel inside one block.
"""

import ctypes

import torch
from torch import Tensor

from shardadam.agreement import digest
from shardadam.layout import ALIGNMENT

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(values: Tensor) -> Tensor:
    """Integers of the same size on the same memory: NaNs too are equal to themselves."""
    return values.detach().view(_BITS[values.itemsize])


def block_sums(values: Tensor) -> Tensor:
    """The sum of the bits of every block of ALIGNMENT elements, modulo 2^64; the rest is one more.

    Args:
        values: 1-D, real and contiguous.

    Returns:
        int64, one element per block.
    """
    values = values.detach()
    if values.data_ptr() % 8:
        values = values.clone()
    whole = values.numel() // ALIGNMENT * ALIGNMENT
    words = values[:whole].view(torch.int64)
    sums = words.view(-1, ALIGNMENT * values.itemsize // 8).sum(1)
    if whole == values.numel():
        return sums
    return torch.cat([sums, bits_of(values[whole:]).sum(dtype=torch.int64).view(1)])


def crc_of(sums: Tensor) -> int:
    """The CRC-32 of what `block_sums` has returned.

    A flipped bit changes one sum by a power of two, which is a run of up to 64 neighbouring bits.
    CRC-32's polynomial divides no such run (its order is 2^32 - 1): it is still seen.
    """
    sums = sums.cpu().contiguous()
    return digest(ctypes.string_at(sums.data_ptr(), sums.nbytes)) if sums.numel() else 0
