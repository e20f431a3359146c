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
    runs: list[Run] = []
    start, last = 0, -2
    for index, piece, grad in grads.owned():
        key = (bucket.bucket.spans[index].group, scalars[index])
        group = param_groups[key[0]]
        if key not in shared:
            shared[key] = coefficients_of(group, *scalars[index])
        stop = piece.shard_offset + piece.numel
        if shard is not None and index == last + 1 and runs[-1].coefficients is shared[key]:
            runs.pop()
        else:
            start = piece.shard_offset
        if shard is not None:
            grad = shard[start:stop]
        amsgrad = bool(group.get("amsgrad", False))
        runs.append(bucket.run(start, stop, grad, shared[key], amsgrad))
        last = index
    return runs
