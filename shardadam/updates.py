"""What of a bucket is to be updated: runs for the kernel, and the steps that they count."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from shardadam.bucket_grads import BucketGrads
from shardadam.buffers import FlatBucket
from shardadam.kernels import Backend, Coefficients, Hyperparameters, Run, Slot
from shardadam.steps import Planned, Steps


@dataclass(frozen=True, slots=True)
class Update:
    """One bucket's."""

    grads: BucketGrads
    steps: Planned
    runs: list[Run]

    def release(self) -> None:
        """Let go of the gradients."""
        for run in self.runs:
            run.release()


class Updater(Protocol):
    """Who makes updates. ``error``: what has kept it from making one; it makes no more then."""

    error: OSError | None

    def run(self, updates: Sequence[Update], skip: Tensor | None) -> Iterator[Update]:
        """Make ``updates``, and yield each when its params are updated. To be gone through."""


class InPlace:
    """Updates state where it is."""

    def __init__(self, backend: Backend) -> None:
        self.error: OSError | None = None
        self._backend = backend

    def run(self, updates: Sequence[Update], skip: Tensor | None) -> Iterator[Update]:
        """As in `Updater`."""
        for update in updates:
            self._backend.update(update.runs, skip)
            yield update


def lack_maximum(
    buckets: Iterable[FlatBucket], param_groups: Sequence[dict[str, Any]]
) -> list[FlatBucket]:
    """Those for which AMSGrad was switched on since they were made."""
    return [
        bucket
        for bucket in buckets
        if not bucket.has_maximum and any(param_groups[g].get("amsgrad") for g in bucket.groups)
    ]


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
