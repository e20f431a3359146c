"""What of a bucket is to be updated: runs for the kernel, and the steps that they count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.gradients import BucketGrads
from shardadam.kernels import Coefficients, Hyperparameters, Run, Slot
from shardadam.steps import Planned, Steps


@dataclass(frozen=True, slots=True)
class Update:
    """One bucket's."""

    grads: BucketGrads
    steps: Planned
    runs: list[Run]


def add_amsgrad(bucket: FlatBucket, param_groups: Sequence[dict[str, Any]]) -> bool:
    """Whether AMSGrad was switched on since ``bucket`` was made, whose state then grows here."""
    amsgrad = any(param_groups[group].get("amsgrad") for group in bucket.groups)
    if not amsgrad or bucket.has_maximum:
        return False
    bucket.add_maximum()
    return True


def plan(
    grads: BucketGrads,
    steps: Steps,
    param_groups: Sequence[dict[str, Any]],
    hypers: Sequence[Hyperparameters],
    factor: Tensor | None,
) -> Update:
    """The next update of a bucket; changes nothing.

    Args:
        grads: the bucket's reduced gradients.
        steps: who counts.
        param_groups: the optimizer's.
        hypers: the same, as the rule reads them.
        factor: what gradients are to be multiplied by, 0-dim.
    """
    planned = steps.plan(grads.bucket, grads.present, hypers, factor)
    return Update(grads, planned, _runs(grads, planned.coefficients, param_groups))


def _runs(
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
        return bucket.runs_in_place(grads.local, coefficients, amsgrad)
    ranges: list[tuple[int, int, Coefficients | Slot]] = []
    for index in grads.owned():
        own = coefficients[index]
        assert own is not None
        if bucket.continues[index] and ranges:
            first, last, shared = ranges[-1]
            if last == index - 1 and shared is own:
                ranges[-1] = first, index, own
                continue
        ranges.append((index, index, own))
    return [
        bucket.run(
            first,
            last,
            shard[bucket.owned_range(first, last)],
            own,
            amsgrad[bucket.bucket.spans[first].group],
        )
        for first, last, own in ranges
    ]
