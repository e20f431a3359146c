"""A flat range of an N-D tensor's elements as boxes: pure integers, no tensors.

[Note: boxes]

A rank owns a range of a param's elements in the order of its memory; a checkpoint that is to be
read at another world size has to say it in the param's own shape. Of a 4 × 5 param, the elements
[3, 17) are three boxes:

    . . . a a
    b b b b b        a = [0:1, 3:5], b = [1:3, 0:5], c = [3:4, 0:2]
    b b b b b
    c c . . .

In general a range has a head, a middle and a tail, the head and the tail are ranges of one dim less
that begin or end at a border, so N dims need at most 2·N − 1 boxes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """Elements ``[offset, offset + size)`` in every dim; the first is number ``first``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int


def boxes_of(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The row-major elements ``[start, stop)`` of ``shape``, cut into boxes in their order."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), (), 0)]
    rest = shape[1:]
    row = math.prod(rest)
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        return _in_row(first, row, boxes_of(rest, head, tail))
    found = []
    if head:
        found += _in_row(first, row, boxes_of(rest, head, row))
        first += 1
    if first < last:
        found.append(Box((first, *(0 for _ in rest)), (last - first, *rest), first * row))
    if tail:
        found += _in_row(last, row, boxes_of(rest, 0, tail))
    return found


def _in_row(index: int, row: int, boxes: list[Box]) -> list[Box]:
    return [Box((index, *box.offsets), (1, *box.sizes), index * row + box.first) for box in boxes]
