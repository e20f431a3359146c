"""Ranges as boxes: every element once, no more boxes than need be."""

import itertools

import pytest
import torch

from shardadam.boxes import boxes_of
from shardadam.shard_tensor import extent_of

SHAPES = [(), (1,), (9,), (4, 5), (3, 1, 4), (1, 1), (2, 3, 4), (3, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_range(shape):
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        boxes = boxes_of(shape, start, stop)
        assert len(boxes) <= max(2 * len(shape) - 1, 1)
        found = []
        for box in boxes:
            ranges = [slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True)]
            part = numbers[tuple(ranges)]
            assert part.shape == box.sizes
            assert part.flatten()[0] == box.first
            found += part.flatten().tolist()
        assert found == list(range(start, stop))
    assert boxes_of(shape, 0, 0) == []


@pytest.mark.parametrize("dims", list(itertools.permutations(range(4))))
def test_dims_in_any_order(dims):
    shape = (3, 2, 1, 4)
    memory = torch.arange(24).reshape([shape[dim] for dim in dims])
    whole = memory.permute([dims.index(dim) for dim in range(4)])  # shaped like the param
    assert whole.shape == shape
    for first, last in itertools.combinations(range(25), 2):
        extent = extent_of(shape, dims, first, last - first, 0, 1)
        found = []
        for box in extent.boxes():
            ranges = [slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True)]
            found += whole[tuple(ranges)].flatten().tolist()
            start = torch.as_strided(memory, box.sizes, extent.strides(), box.first)
            assert torch.equal(start, whole[tuple(ranges)])
        assert sorted(found) == list(range(first, last))


def test_ten_thousand_million_elements():
    boxes = boxes_of((100_000, 100_000), 3_000_000_001, 9_999_999_999)
    assert sum(box.sizes[0] * box.sizes[1] for box in boxes) == 6_999_999_998
    assert boxes[1].offsets == (30_001, 0)
