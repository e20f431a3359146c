"""Reduction during backward: buckets go out as they fill, in an order that all ranks share.

A bucket is sent once the gradients of all its params have been accumulated, and those before it in
the layout have been sent: which is the order in which backward fills them, but for surprises. Its
exchange goes on beside the rest of the backward pass. Where the update is made in backward too, it
follows as soon as a bucket has been reduced, and no more than a few buckets' gradients ever exist.
"""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardadam.agreement import Point, digest, meet
from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.exchange import Union
from shardadam.gradients import BucketGrads, GradReducer


class Backward:
    """Follows backward passes by hooks on the params.

    Attributes:
        syncing: whether to; False under `no_sync()`.
        failed: whether a rank's gradient stopped the updates of a backward pass midway.
        check, update: the optimizer's, where it updates in backward: raises before the first
            update what is wrong; updates buckets that have been reduced.
    """

    def __init__(
        self,
        reducer: GradReducer,
        communicator: Communicator,
        check: weakref.WeakMethod[Any] | None,
        update: weakref.WeakMethod[Any] | None,
    ) -> None:
        self.syncing = True
        self.failed = False
        self.check, self.update = check, update
        self._reducer, self._communicator = reducer, communicator
        self._arrived: list[int] = []
        self._expected: list[int] = []
        self._sent = 0
        self._pass: int | None = None  # autograd's id of the backward pass under way
        self._error: Exception | None = None  # for its end
        self._presence: dict[BucketGrads, Union] = {}
        if update is not None:
            reducer.landed = self._landed

    def watch(self, buckets: Sequence[FlatBucket]) -> None:
        """Follow the gradients of more buckets, the reducer's last ones."""
        this, first = weakref.ref(self), len(self._reducer.grads) - len(buckets)
        for index, bucket in enumerate(buckets, first):
            for param in bucket.params:
                if param.requires_grad:
                    hook = functools.partial(_arrived, this, index)
                    param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def on_grad(self, index: int) -> None:
        """A gradient of bucket ``index`` has been accumulated by the backward pass under way."""
        if not self.syncing:
            self._reducer.left_over = True
            return
        under_way = torch._C._current_graph_task_id()
        if self._pass != under_way:
            # Also after a backward pass that was broken off by an exception.
            self._pass = under_way
            self._begin()
        self._arrived[index] += 1
        # Every rank must reduce the same bucket at the same time, whatever the order they fill in.
        while self._sent < len(self._expected):
            if self._arrived[self._sent] < self._expected[self._sent]:
                break
            self._send()

    def _begin(self) -> None:
        self._sent, self._error = 0, None
        self._presence.clear()
        params = [grads.bucket.params for grads in self._reducer.grads]
        self._arrived = [0] * len(params)
        self._expected = [sum(param.requires_grad for param in bucket) for bucket in params]
        error = None
        check = self.check and self.check()
        if check is not None:
            try:
                check()
            except (ValueError, RuntimeError) as caught:
                error = caught
        meet(self._communicator, Point.BACKWARD, error=error)
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._reducer.land()

    def _send(self) -> None:
        grads = self._reducer.grads[self._sent]
        self._sent += 1
        if self._reducer.exchanges:
            error = self._reducer.send_and_free(grads, transient=self.update is not None)
            if self.update is not None:
                # Before the update all must know which params any rank has a gradient of, and
                # whether any has one that can't be used.
                flags = [*grads.present, error is not None]
                self._presence[grads] = self._communicator.start_union(flags)
        else:
            error = self._reducer.take_in_place(grads)
        self._error = self._error or error

    def _landed(self, grads: BucketGrads) -> None:
        """Update a bucket that this pass has reduced."""
        flags = self._presence.pop(grads, None)
        if self._reducer.exchanges and flags is None:
            return  # step() reduces what a no_sync() has left
        if flags is not None:
            *grads.present, failed = flags.wait()
            self.failed = self.failed or failed
        if not self.failed and any(grads.present):
            assert self.update is not None
            update = self.update()
            assert update is not None
            update([grads])
        grads.updated, grads.shard = True, None

    def _end(self) -> None:
        """Reduce the buckets that did not fill (unused params), so that no rank waits for them."""
        self._pass = None
        while self._sent < len(self._reducer.grads):
            self._send()
        self._reducer.land()
        present = [present for grads in self._reducer.grads for present in grads.present]
        words = {"present": digest(bytes(present))}
        seen = meet(self._communicator, Point.BACKWARD_END, words, self._error)
        if not seen["present"].agreed:
            present = self._communicator.union(present)
        if self.update is None:
            self._reducer.reduce(present)


def _arrived(backward: "weakref.ref[Backward]", index: int, param: Tensor) -> None:
    """The hook on a param. It does not keep a discarded optimizer alive, and then does nothing."""
    alive = backward()
    if alive is not None:
        alive.on_grad(index)
