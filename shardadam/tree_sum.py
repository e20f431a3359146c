"""Sums over microbatches in one order, whoever has which of them.

[Note: the tree over microbatches]

A sum of floating-point numbers depends on its order. Here it is that of a binary tree over the
numbers of all microbatches of a step, of which every rank has a range. 12 microbatches on 3 ranks:

                           +
                +                      +
          +           +          +           .          . = nothing
       +     +     +     +     +    +
      0 1   2 3   4 5   6 7   8 9  10 11                microbatches
      rank 0 ...  rank 1 ...  rank 2 ....

A *block* is what hangs on one node: 2^k microbatches from a multiple of 2^k on. Any range is a few
blocks: of n microbatches at most 2 log2(n), and a rank can sum each by itself, as its microbatches
come. What is above the blocks of all ranks is summed where they meet. So all additions are those of
the tree, whatever the ranges are; and where one side of a node is empty, there is none.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def blocks(numbers: range) -> Iterator[range]:
    """The largest blocks that ``numbers`` are made of, in order."""
    start = numbers.start
    while start < numbers.stop:
        # What divides 0 is as large as one likes.
        length = start & -start or 1 << numbers.stop.bit_length()
        while start + length > numbers.stop:
            length //= 2
        yield range(start, start + length)
        start += length


class TreeSum:
    """Grows by blocks from left to right, and adds up those that are one node's both sides.

    Attributes:
        blocks: those that there are, each with its sum: a list of tensors.
        free: lists of tensors that have been added to others, to be used again.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[range, list[Tensor]]] = []
        self.free: list[list[Tensor]] = []

    def append(self, block: range, tensors: list[Tensor]) -> None:
        """Take ``tensors``, which are written to, as the sum of ``block``."""
        self.blocks.append((block, tensors))
        while len(self.blocks) > 1:
            (left, _), (right, _) = self.blocks[-2:]
            if len(left) != len(right) or left.start % (2 * len(left)):
                break
            self._add_last()

    def total(self) -> list[Tensor]:
        """The sum of all, which are now one."""
        while len(self.blocks) > 1:
            self._add_last()
        return self.blocks[0][1]

    def clear(self) -> None:
        """Forget all sums, and keep their memory."""
        self.free += [tensors for _, tensors in self.blocks]
        self.blocks = []

    def _add_last(self) -> None:
        right, terms = self.blocks.pop()
        left, sums = self.blocks[-1]
        torch._foreach_add_(sums, terms)
        self.blocks[-1] = range(left.start, right.stop), sums
        self.free.append(terms)
