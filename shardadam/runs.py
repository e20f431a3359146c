"""What of a bucket is to be updated, as runs for the kernel."""

from collections.abc import Sequence
from typing import Any

from shardadam.gradients import BucketGrads
from shardadam.kernels import Coefficients, Run, Slot


def bucket_runs(
    grads: BucketGrads,
    coefficients: Sequence[Coefficients | Slot | None],
    param_groups: Sequence[dict[str, Any]],
) -> list[Run]:
    """One bucket's runs on this rank.

    Neighbours whose gradients lie in one buffer and that share their coefficients become one run:
    what lies between them is padding, nobody's elements.

    Args:
        grads: the bucket's gradients.
        coefficients: of every span that has a gradient; one object where they are the same.
        param_groups: the optimizer's.
    """
    bucket, shard = grads.bucket, grads.shard
    amsgrad = [bool(group.get("amsgrad", False)) for group in param_groups]
    if shard is None:
        return [
            bucket.run_in_place(index, own, amsgrad[bucket.bucket.spans[index].group])
            for index in grads.owned()
            if (own := coefficients[index]) is not None
        ]
    ranges: list[tuple[int, int, int, int, Coefficients | Slot]] = []
    for index in grads.owned():
        own = coefficients[index]
        assert own is not None
        piece = bucket.pieces[index]
        start, stop = piece.shard_offset, piece.shard_offset + piece.numel
        if ranges:
            last, first_start, *_, last_coefficients = ranges[-1]
            if index == last + 1 and own is last_coefficients:
                ranges.pop()
                start = first_start
        ranges.append((index, start, stop, bucket.bucket.spans[index].group, own))
    return [
        bucket.run(start, stop, shard[start:stop], shared, amsgrad[group])
        for _, start, stop, group, shared in ranges
    ]
