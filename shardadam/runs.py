"""What of a bucket is to be updated, as runs for the kernel."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardadam.gradients import BucketGrads
from shardadam.kernels import Coefficients, Run


def bucket_runs(
    grads: BucketGrads,
    advanced: Mapping[str, Tensor],
    param_groups: Sequence[dict[str, Any]],
    coefficients_of: Callable[..., Coefficients],
) -> list[Run]:
    """One bucket's runs on this rank.

    Neighbours whose gradients lie in one buffer and that share their coefficients become one run:
    what lies between them is padding, nobody's elements.

    Args:
        grads: the bucket's gradients.
        advanced: the bucket's scalars after this step.
        param_groups: the optimizer's.
        coefficients_of: called with a param group and a param's scalars, once for each pair.
    """
    bucket, shard = grads.bucket, grads.shard
    scalars = list(zip(*(values.tolist() for values in advanced.values()), strict=True))
    shared: dict[tuple[int, tuple[float, ...]], Coefficients] = {}
    ranges: list[tuple[int, int, int, int, Coefficients]] = []
    for index in grads.owned():
        group = bucket.bucket.spans[index].group
        key = (group, scalars[index])
        coefficients = shared.get(key)
        if coefficients is None:
            coefficients = shared[key] = coefficients_of(param_groups[group], *scalars[index])
        piece = bucket.pieces[index]
        start, stop = piece.shard_offset, piece.shard_offset + piece.numel
        if shard is not None and ranges:
            last, first_start, *_, last_coefficients = ranges[-1]
            if index == last + 1 and coefficients is last_coefficients:
                ranges.pop()
                start = first_start
        ranges.append((index, start, stop, group, coefficients))
    amsgrad = [bool(group.get("amsgrad", False)) for group in param_groups]
    return [
        bucket.run(
            start,
            stop,
            grads.in_place(index) if shard is None else shard[start:stop],
            coefficients,
            amsgrad[group],
        )
        for index, start, stop, group, coefficients in ranges
    ]
