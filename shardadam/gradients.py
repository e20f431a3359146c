"""Gradients, from ``param.grad`` of every rank to what the update reads.

Where they need no exchange (one rank, DTensors, or ``grad_sync="none"``) they are read from
``param.grad`` in place. Otherwise each bucket is packed and reduce-scattered: in `step()`, or, with
``shard_grads=True``, inside backward (see `backward`), after which the full gradients are freed.
While one bucket is under way the next is packed.
"""

import itertools
import warnings
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardadam.agreement import Point, Range, digest, meet
from shardadam.bucket_grads import BucketGrads, grads_of
from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.exchange import Exchange
from shardadam.kernels.run import state_dtype
from shardadam.replicas import Replicas

LANES = 2
"""Buckets under way: each takes two buckets of memory."""


class GradReducer:
    """All buckets' gradients.

    ``exchanges``: they are averaged here; ``eager``: during backward. ``keeps``: the last backward
    pass has reduced them too, for DDP, and ``param.grad`` is still there.
    """

    def __init__(self, communicator: Communicator, grad_sync: str, shard_grads: bool) -> None:
        self.exchanges = grad_sync == "mean" and communicator.world_size > 1
        self.eager = self.exchanges and shard_grads
        self.grads: list[BucketGrads] = []
        self.keeps = False
        self.left_over = False  # gradients have been left in param.grad by no_sync()
        self.landed: weakref.WeakMethod[Any] | None = None  # what follows, in backward
        self._communicator, self._compares = communicator, grad_sync == "mean"
        self._hint = self.exchanges
        self._under_way: deque[tuple[BucketGrads | None, Tensor, Exchange]] = deque()
        self._sent = 0
        self._kept: list[tuple[Tensor, int] | None] | None = None

    @property
    def updated(self) -> bool:
        """Whether a backward pass has updated params."""
        return any(grads.updated for grads in self.grads)

    def add(self, placed: Mapping[FlatBucket, Replicas | None]) -> None:
        """Take charge of more buckets, those of DTensors with who else has their elements."""
        self.grads += itertools.starmap(grads_of, placed.items())

    def clear(self) -> None:
        """Forget reduced gradients; ``param.grad`` is not touched."""
        self.left_over = self.keeps = False
        self._kept = None
        # What an exception left under way in backward lands, and counts for nothing.
        self._under_way = deque((None, mean, exchange) for _, mean, exchange in self._under_way)
        for grads in self.grads:
            grads.clear()

    def look(self) -> None:
        """Read every ``param.grad``, once for all that a step asks."""
        for grads in self.grads:
            grads.look()

    def check(self, differentiable: bool) -> None:
        """Raise if a gradient, as last looked at, can't be used; names the param.

        Args:
            differentiable: whether the step is to be, which one in place can't.

        Raises:
            RuntimeError: a sparse gradient.
            ValueError: a gradient of another dtype, device or shape than its param's.
        """
        if differentiable and any(self.presence()):
            raise ValueError(
                "differentiable=True is not supported: step() writes params in place. "
                "Use torch.optim to differentiate through a step"
            )
        for grads in self.grads:
            found = grads.misfit()
            if found is not None:
                raise found[1]
            if grads.updated:
                for name, grad in zip(grads.bucket.names, grads.local, strict=True):
                    if grad is not None:
                        raise ValueError(
                            f"the gradient of {name} came after backward had updated it: expected "
                            "all but the last backward pass under no_sync(), and no DDP wrapper "
                            "with update_in_backward=True"
                        )
        changed = None if self._kept is None else self.changed_since(self._kept)
        if changed is not None:
            raise ValueError(
                f"the gradient of {changed} changed after backward had reduced it: expected "
                "optimizer.clip_grad_norm_() or max_grad_norm to clip it, and all but the last "
                "backward pass under DDP's no_sync()"
            )
        if self.eager and not self.left_over:
            for grads in self.grads:
                for name, done, grad in zip(
                    grads.bucket.names, grads.present, grads.local, strict=True
                ):
                    if done and grad is not None:
                        raise ValueError(
                            f"the gradient of {name} came back after it had been reduced and freed "
                            "in backward: expected no DDP wrapper with shard_grads=True"
                        )

    def presence(self) -> list[bool]:
        """Per span of every bucket in order: is there a gradient, here or already reduced?"""
        return [
            (self.eager and present) or grad is not None
            for grads in self.grads
            for present, grad in zip(grads.present, grads.local, strict=True)
        ]

    def union(self, present: list[bool]) -> list[bool]:
        """Which params any rank has a gradient of, given this rank's `presence`. Collective.

        Raises:
            ValueError: of a DTensor, whose gradient is nobody's to make, not every rank has one.
        """
        own = [grads.bucket.exchanged for grads in self.grads for _ in grads.present]
        lacking = [not (there or exchanged) for there, exchanged in zip(present, own, strict=True)]
        flags = self._communicator.union([*present, *lacking])
        union, lacked = flags[: len(present)], flags[len(present) :]
        names = [name for grads in self.grads for name in grads.bucket.names]
        for name, there, somewhere in zip(names, union, lacked, strict=True):
            if there and somewhere:
                raise ValueError(
                    f"{name} is a DTensor and has a gradient on some ranks only: expected one on "
                    "every rank of its mesh, or on none"
                )
        return union

    def lines(self) -> list[str]:
        """What ranks must agree on: gradients distributed in another way than DTensor params."""
        return [line for grads in self.grads for line in grads.misplaced()]

    def place(self) -> None:
        """Bring these to where their params are. Collective over their meshes."""
        for grads in self.grads:
            grads.place(compare=self._compares)

    def unreduced(self) -> bool:
        """Whether gradients wait in ``param.grad`` although backward should have reduced them."""
        return self.eager and any(grad is not None for grads in self.grads for grad in grads.local)

    def fingerprint(self) -> int:
        """Of this rank's first gradient, until the ranks have been compared; 0 if all zero."""
        if not self._hint or _capturing():
            return 0
        for grads in self.grads:
            for grad in grads.local if grads.bucket.exchanged else []:
                if grad is not None and grad.numel():
                    total = float(grad.detach().abs().sum(dtype=torch.float64))
                    return digest(repr(total)) if total else 0
        return 0

    def give_hint(self, fingerprints: Range, point: Point) -> None:
        """Say so, once, if the ranks' gradients are equal before they are averaged."""
        hint, self._hint = self._hint, False
        if hint and fingerprints.agreed and fingerprints.high:
            error: Warning | None = None
            try:
                if self._communicator.rank == 0:
                    warnings.warn(
                        "gradients are equal on all ranks already (a DDP wrapper?): averaging them "
                        'once more is right but redundant. Pass grad_sync="none" to save it, or '
                        "drop the wrapper",
                        stacklevel=5,
                    )
            except Warning as raised:
                error = raised
            meet(self._communicator, point, error=error)  # where warnings are errors, on all ranks

    def versions(self) -> list[tuple[Tensor, int] | None]:
        """The gradient of every param, kept alive, and how often it has been written."""
        if self.eager:
            return self.shard_versions()
        return [version for grads in self.grads for version in grads.versions()]

    def shard_versions(self) -> list[tuple[Tensor, int] | None]:
        """As `versions`, where the full gradients are gone."""
        shards = (grads.shard for grads in self.grads for _ in grads.local)
        return [None if shard is None else (shard, shard._version) for shard in shards]

    def changed_since(self, versions: list[tuple[Tensor, int] | None]) -> str | None:
        """The name of the first param whose gradient is not what it was at `versions`."""
        names = [name for grads in self.grads for name in grads.bucket.names]
        if self.eager:
            for name, grad in zip(names, (g for b in self.grads for g in b.local), strict=True):
                if grad is not None:
                    return name
        for name, before, now in zip(names, versions, self.versions(), strict=False):
            if before is None or now is None:
                if before is not now:
                    return name
            elif before[0] is not now[0] or before[1] != now[1]:
                return name
        return None

    def reduce(self, present: list[bool], rescale: Tensor | None = None) -> None:
        """Bring every bucket's gradients to where the update reads them.

        Args:
            present: as `presence`, but agreed on by all ranks.
            rescale: 0-dim; this rank's gradients are multiplied by it first.
        """
        flags = iter(present)
        for grads in self.grads:
            grads.present = list(itertools.islice(flags, len(grads.present)))
            there = grads.bucket.exchanged and any(grads.present)
            if self.exchanges and there and not (self.eager or self.keeps):
                self.send(grads, rescale)
        self.land()

    def reduce_leftovers(self) -> None:
        """With ``shard_grads``: reduce what no backward pass has (a `no_sync()`, a hand-made grad).

        Entered by every rank, whether it has leftovers or not.
        """
        self.land()  # what a pass that was broken off has left: into the same memory
        for grads in self.grads:
            if not grads.updated:
                self.send_and_free(grads)
        self.land()

    @torch.no_grad()
    def send(
        self, grads: BucketGrads, rescale: Tensor | None = None, transient: bool = False
    ) -> None:
        """Begin to reduce a bucket's local gradients into its shard, at most `LANES` at a time.

        ``transient``: the shard's memory is used again by what is sent `LANES` later.
        """
        if not self._under_way:
            self._sent = 0  # so that a bucket takes the same lane at every step
        while len(self._under_way) >= LANES:
            self._land_first()
        lane = self._sent % LANES
        bucket, ranks = grads.bucket, self._communicator
        packed = ranks.buffer(f"packed {lane}", bucket.bucket.numel, bucket.dtype)
        bucket.pack(grads.local, packed)
        if rescale is not None:
            packed.mul_(rescale)
        # Another backward pass of the same step is added to the first's shard.
        if transient or (self.eager and grads.shard is not None):
            numel, dtype = bucket.bucket.shard_numel, state_dtype(bucket.dtype)
            mean = ranks.buffer(f"mean {lane}", numel, dtype)
        else:
            mean = grads.memory()
        exchange = ranks.start_reduce_scatter_mean(packed, mean, lane)
        self._under_way.append((grads, mean, exchange))
        self._sent += 1

    def send_and_free(self, grads: BucketGrads, transient: bool = False) -> Exception | None:
        """As `send`, and free the full gradients; what is wrong with one, which is left out."""
        error = self.take(grads)
        self.send(grads, transient=transient)
        if not self.keeps:
            grads.free()
        return error

    def keep(self) -> None:
        """Remember the gradients that have been reduced: changes to them would be lost."""
        self.look()
        self._kept = self.versions()

    def take(self, grads: BucketGrads) -> Exception | None:
        """Look at local gradients; what is wrong with one, which is left out.

        The other ranks wait in the exchange: join them, and raise when all meet.
        """
        grads.look()
        error = None
        while (found := grads.misfit()) is not None:
            index, error = found
            grads.local[index] = None
        grads.present = [
            before or grad is not None
            for before, grad in zip(grads.present, grads.local, strict=True)
        ]
        return error

    @torch.no_grad()
    def land(self) -> None:
        """Wait for all that is under way."""
        while self._under_way:
            self._land_first()

    def _land_first(self) -> None:
        grads, mean, exchange = self._under_way[0]
        exchange.wait()
        self._under_way.popleft()
        if grads is None:
            return
        if grads.shard is None or grads.shard.data_ptr() == mean.data_ptr():
            grads.shard = mean
        else:
            grads.shard += mean
        landed = None if self.landed is None else self.landed()
        if landed is not None:
            landed(grads)


def not_the_same() -> ValueError:
    """The error for ranks whose gradients are said to be equal, and are not of the same params."""
    return ValueError('grad_sync="none", but not every rank has gradients for the same params')


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
