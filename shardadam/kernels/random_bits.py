"""Random bits for stochastic rounding that depend on seed, step and element, and on nothing else.

So a result does not depend on the world size, the device, or where a shard is cut. The same
integers as csrc/random_bits.h.
"""

import torch
from torch import Tensor

BLOCK = 128
STATE, PARAM = 0, 1  # streams: what the bits are for


def random_bits(seed: int, step: float, first_block: int, blocks: int, stream: int) -> Tensor:
    """32 bits (int64) for every element of ``blocks`` blocks from number ``first_block`` on.

    A 64-bit mix of seed, step, stream and block (the finalizer of SplitMix64: Steele, Lea and
    Flood 2014), and from it two multiplications per element (by MurmurHash3's factors: Appleby).
    The upper bits are the better ones.
    """
    key = _mix64(_mix64(torch.tensor(seed)) + 2 * int(step) + stream)
    keys = _mix64(key + torch.arange(first_block, first_block + blocks))[:, None]
    bits = ((keys ^ (torch.arange(BLOCK) * 0x9E3779B9)) * 0x85EBCA6B) & 0xFFFFFFFF
    return ((bits ^ (bits >> 15)) * 0xC2B2AE35) & 0xFFFFFFFF


def _mix64(value: Tensor) -> Tensor:
    # int64 wraps around as uint64 does.
    value = (value ^ _shifted(value, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ _shifted(value, 27)) * (0x94D049BB133111EB - 2**64)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """As an unsigned shift to the right."""
    mask: int = 2 ** (64 - bits) - 1
    return (value >> bits) & mask
