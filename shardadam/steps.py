"""The step counters of every param, and the coefficients that follow from them.

A param's step counts where it has a gradient, so params of one group may stand at different steps.
Planning changes nothing; `commit` does. There are two ways: on the host, which then knows all
numbers, and on the device, for which a step waits for nothing.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.kernels import Coefficients, Hyperparameters, Row, Slot, fold

_KEPT = 64  # patterns of which params have gradients


@dataclass(slots=True)
class Planned:
    """One bucket's next step: a span's ``coefficients``, one object where they are the same."""

    bucket: FlatBucket
    coefficients: list[Coefficients | Slot | None]
    scalars: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


class Steps(Protocol):
    """How steps are counted."""

    def watch(self, bucket: FlatBucket) -> None:
        """Count for ``bucket`` from now on; also to be called when its scalars were written."""

    def plan(
        self,
        bucket: FlatBucket,
        present: Sequence[bool],
        hypers: Sequence[Hyperparameters],
        factor: Tensor | None,
    ) -> Planned:
        """A step for the spans that have a gradient; ``hypers`` are those of all param groups."""

    def commit(
        self, planned: Sequence[Planned], factor: Tensor | None, skip: Tensor | None
    ) -> None:
        """Count what was planned, unless ``skip`` is not 0."""


class HostSteps:
    """Steps on the host."""

    def watch(self, bucket: FlatBucket) -> None:
        """Nothing to do."""

    def plan(
        self,
        bucket: FlatBucket,
        present: Sequence[bool],
        hypers: Sequence[Hyperparameters],
        factor: Tensor | None,
    ) -> Planned:
        """As in `Steps`."""
        everywhere = all(present)
        counted = bucket.scalars["step"] + (1 if everywhere else torch.tensor(present))
        scalars = {"step": counted}
        groups, steps, spans = bucket.span_groups, counted.tolist(), len(present)
        before = bucket.scalars.get("mu_product")
        products = [1.0] * spans if before is None else before.tolist()
        columns: tuple[list[Any], ...] = groups, steps, products
        alike = everywhere and all(column.count(column[0]) == spans for column in columns)
        times = spans if alike else 1
        if alike:  # as nearly always: one span stands for all
            present, groups, steps, products = [True], groups[:1], steps[:1], products[:1]
        if before is not None:
            for index, group in enumerate(groups):
                if present[index]:
                    products[index] *= hypers[group].momentum(steps[index])
            scalars["mu_product"] = torch.tensor(products * times, dtype=torch.float64)
        grad_factor = 1.0 if factor is None else float(factor)
        keys = list(zip(groups, steps, products, strict=True))
        shared = {
            key: fold(hypers[key[0]], key[1], key[2], grad_factor)
            for key in dict.fromkeys(itertools.compress(keys, present))
        }
        coefficients: list[Coefficients | Slot | None] = [
            shared[key] if there else None for key, there in zip(keys, present, strict=True)
        ]
        return Planned(bucket, coefficients * times, scalars=scalars)

    def commit(
        self, planned: Sequence[Planned], factor: Tensor | None, skip: Tensor | None
    ) -> None:
        """As in `Steps`."""
        assert skip is None, "the host knows, and calls this or not"
        for plan in planned:
            for name, values in plan.scalars.items():
                plan.bucket.scalars[name].copy_(values)


class DeviceSteps:
    """Steps on the device.

    The host does not see them. What it needs to know is which neighbours are always at the same
    step: those that were when it last looked, and have had gradients at the same steps since.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._known: dict[FlatBucket, _Known] = {}

    def watch(self, bucket: FlatBucket) -> None:
        """As in `Steps`; waits for the device."""
        known = self._known.setdefault(bucket, _Known(bucket))
        known.look(bucket)

    def plan(
        self,
        bucket: FlatBucket,
        present: Sequence[bool],
        hypers: Sequence[Hyperparameters],
        factor: Tensor | None,
    ) -> Planned:
        """As in `Steps`."""
        known = self._known[bucket]
        if known.version != _version(bucket):
            known.look(bucket)  # users may write to ``optimizer.state``
        segments, slots = known.look_up(present, hypers)
        rows = [
            Row(
                hyper=hypers[group],
                lr=_on(bucket.device, hypers[group].lr),
                step=bucket.scalars["step"],
                mu_product=bucket.scalars.get("mu_product"),
                coefficients=known.table,
                first=first,
                count=count,
            )
            for first, count, group in segments
        ]
        return Planned(bucket, slots, rows=rows)

    def commit(
        self, planned: Sequence[Planned], factor: Tensor | None, skip: Tensor | None
    ) -> None:
        """As in `Steps`."""
        self._backend.advance([row for plan in planned for row in plan.rows], factor, skip)


def _version(bucket: FlatBucket) -> int:
    """Other than it was if torch wrote to the scalars; kernels write raw memory."""
    return sum(values._version for values in bucket.scalars.values())


def _on(device: torch.device, lr: float | Tensor) -> Tensor | None:
    return lr.to(device, torch.float64, non_blocking=True) if isinstance(lr, Tensor) else None


_Segment = tuple[int, int, int]


def _segments(present: Sequence[bool], groups: Sequence[int]) -> Iterator[_Segment]:
    """First span, number and group of neighbours of one group that all have a gradient."""
    spans = zip(present, groups, strict=True)
    first = 0
    for (there, group), members in itertools.groupby(spans):
        count = len(list(members))
        if there:
            yield first, count, group
        first += count


class _Known:
    """What the host knows of a bucket's steps on the device.

    ``table`` stays where it is as long as the bucket does: a CUDA graph may write to it.
    """

    def __init__(self, bucket: FlatBucket) -> None:
        self.groups = bucket.span_groups
        self.table = torch.zeros(
            (len(self.groups), len(Coefficients.__slots__)),
            dtype=torch.float64,
            device=bucket.device,
        )
        self.version = -1
        self._classes: list[int] = []
        self._terms: list[tuple[bool, bool]] = []
        self._found: dict[tuple[bool, ...], tuple[list[_Segment], list[Any]]] = {}

    def look(self, bucket: FlatBucket) -> None:
        """Read the steps: spans of one group and class are at the same."""
        scalars = zip(*(values.tolist() for values in bucket.scalars.values()), strict=True)
        numbers: dict[Any, int] = {}
        self._classes = [numbers.setdefault(key, len(numbers)) for key in scalars]
        self._found.clear()
        self.version = _version(bucket)

    def look_up(
        self, present: Sequence[bool], hypers: Sequence[Hyperparameters]
    ) -> tuple[list[_Segment], list[Coefficients | Slot | None]]:
        """The segments of spans with a gradient, and where every such span's coefficients are."""
        terms = [
            (hyper.momentum_decay is not None, not hyper.decoupled and hyper.weight_decay != 0)
            for hyper in hypers
        ]
        if terms != self._terms:
            self._terms = terms
            self._found.clear()
        pattern = tuple(present)
        if pattern not in self._found:
            if len(self._found) > _KEPT:
                self._found.clear()
            self._part(present)
            shared: dict[tuple[int, int], Slot] = {}
            spans = enumerate(zip(self.groups, self._classes, present, strict=True))
            slots = [
                shared.setdefault((group, number), Slot(self.table, index, *terms[group]))
                if there
                else None
                for index, (group, number, there) in spans
            ]
            self._found[pattern] = list(_segments(present, self.groups)), slots
        return self._found[pattern]

    def _part(self, present: Sequence[bool]) -> None:
        """From now on, spans with and without a gradient are of different classes."""
        numbers: dict[Any, int] = {}
        pairs = zip(self._classes, present, strict=True)
        classes = [numbers.setdefault(pair, len(numbers)) for pair in pairs]
        if len(numbers) != len(set(self._classes)):
            self._classes = classes
            self._found.clear()
