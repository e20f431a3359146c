"""Reduction during backward: buckets go out as they fill, in an order that all ranks share.

A bucket is sent once the gradients of all its params have been accumulated, and those before it in
the layout have been sent: which is the order in which backward fills them, but for surprises. Its
exchange goes on beside the rest of the backward pass. Where the update is made in backward too, it
follows as soon as a bucket has been reduced, and no more than a few buckets' gradients ever exist.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardadam.agreement import Point, difference, digest, meet
from shardadam.bucket_grads import BucketGrads
from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.exchange import Union
from shardadam.gradients import GradReducer, not_the_same
from shardadam.microbatches import MicrobatchReducer


class EarlyUpdate(NamedTuple):
    """The optimizer's methods, where it updates in backward.

    ``check`` raises what is wrong before the first update, and returns what must be equal on every
    rank: lines, and a word that ``compare`` gets from all of them; ``update`` updates buckets that
    have been reduced; ``settle`` ends a pass.
    """

    check: weakref.WeakMethod[Any]
    compare: weakref.WeakMethod[Any]
    update: weakref.WeakMethod[Any]
    settle: weakref.WeakMethod[Any]

    @classmethod
    def of(cls, *methods: Callable[..., Any]) -> EarlyUpdate:
        """Of the methods in their order: the hooks must not keep the optimizer alive."""
        return cls(*[weakref.WeakMethod(method) for method in methods])


class Backward:
    """Follows backward passes by hooks on the params.

    Attributes:
        syncing: whether to; False under `no_sync()`.
        failed: whether a rank's gradient stopped the updates of a backward pass midway.
        early: what the optimizer does in backward, where it updates there.
    """

    def __init__(
        self,
        reducer: GradReducer,
        communicator: Communicator,
        early: EarlyUpdate | None,
    ) -> None:
        self.syncing = True
        self.failed = False
        self.early = early
        self._reducer, self._communicator = reducer, communicator
        self._arrived: list[int] = []
        self._expected: list[int] = []
        self._sent = 0
        self._index: dict[Tensor, int] = {}  # of the bucket of a param, where DDP asks
        self._pass: int | None = None  # autograd's id of the backward pass under way
        self._error: Exception | None = None  # for its end
        self._presence: dict[BucketGrads, Union] = {}
        if early is not None:
            reducer.landed = weakref.WeakMethod(self._landed)

    def watch(self, buckets: Sequence[FlatBucket]) -> None:
        """Follow the gradients of more buckets, the reducer's last ones, if passes reduce any."""
        if not self._reducer.eager and self.early is None:
            return
        this, first = weakref.ref(self), len(self._reducer.grads) - len(buckets)
        for index, bucket in enumerate(buckets, first):
            for param in bucket.params:
                if param.requires_grad:
                    hook = functools.partial(_arrived, this, index)
                    param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Raise RuntimeError if an earlier pass left updates half made."""
        if self.early is None:
            return
        if self.failed:
            raise RuntimeError(
                "an earlier backward() was broken off by a gradient that can't be used, perhaps "
                "after it had updated other params. Load a checkpoint into a new optimizer"
            )
        if self._pass is not None:
            raise RuntimeError(
                "a backward pass was broken off, or has another inside it, and "
                "update_in_backward=True may have updated some params and not others: expected "
                "zero_grad() after an error, and no checkpoint(use_reentrant=True)"
            )

    def forget(self) -> None:
        """Forget a pass that was broken off."""
        self._pass = None
        self._presence.clear()

    def on_grad(self, index: int) -> None:
        """A gradient of bucket ``index`` has been accumulated by the backward pass under way."""
        if not self.syncing:
            self._reducer.left_over = True
            return
        under_way = torch._C._current_graph_task_id()
        if self._pass != under_way:
            # Also after a backward pass that was broken off by an exception.
            self._begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
            self._pass = under_way
        self._arrived[index] += 1
        # Every rank must reduce the same bucket at the same time, whatever the order they fill in.
        while self._sent < len(self._expected):
            if self._arrived[self._sent] < self._expected[self._sent]:
                break
            self._send()

    def on_ddp_bucket(self, params: Sequence[Tensor], *, first: bool, last: bool) -> None:
        """DDP has these gradients, and leaves their reduction to this.

        Outside a backward pass this rank has run out of inputs, and takes part in the others'.
        """
        reducer = self._reducer
        if reducer.eager or self.early is not None:
            raise ValueError(
                "DDP keeps gradients, and shard_grads=True and update_in_backward=True free them: "
                "expected neither with DDP's hook, or no DDP"
            )
        if self._communicator.world_size == 1:
            return
        if not all(grads.bucket.exchanged for grads in reducer.grads):
            raise ValueError(
                "DDP's hook is for an optimizer of DDP's params, and some are DTensors: expected "
                "these in another optimizer"
            )
        if isinstance(reducer, MicrobatchReducer):
            raise ValueError(
                "with the hook DDP reduces gradients during backward, and exact_microbatches takes "
                "those of each rank: expected one of the two, and no DDP with the other"
            )
        if not reducer.exchanges:
            raise ValueError(
                'with the hook DDP does not average gradients: expected grad_sync="mean", found '
                '"none"'
            )
        if first:
            reducer.keeps = True
            self._index = {
                param: index
                for index, grads in enumerate(reducer.grads)
                for param in grads.bucket.params
            }
        joins = torch._C._current_graph_task_id() < 0
        if joins and first:
            for param in self._index:
                param.grad = None
            self._begin()
        for param in params:
            if param in self._index and not joins:
                self.on_grad(self._index[param])
        if joins and last:
            self._end()

    def _begin(self) -> None:
        self._sent, self._error = 0, None
        params = [grads.bucket.params for grads in self._reducer.grads]
        self._arrived = [0] * len(params)
        self._expected = [sum(param.requires_grad for param in bucket) for bucket in params]
        error: Exception | None = None
        lines: list[str] = []
        replicas = 0
        try:
            lines, replicas = self._check_early()
        except (ValueError, RuntimeError, OSError) as caught:
            error = caught
        words = {"hyperparameters": digest("\n".join(lines)), "replicas": replicas}
        seen = meet(self._communicator, Point.BACKWARD, words, error)
        if not seen["hyperparameters"].agreed:
            raise difference(self._communicator, lines)
        compare = self.early and self.early.compare()
        if compare is not None:
            compare(seen["replicas"])
        self._reducer.land()

    def _check_early(self) -> tuple[list[str], int]:
        """Raise before a pass updates anything what is wrong; what ranks must agree on."""
        check = self.early and self.early.check()
        if check is None:
            return [], 0
        if self._reducer.updated:
            raise RuntimeError(
                "a second backward pass, and update_in_backward=True has updated the params in the "
                "first: expected step() after each, or the earlier ones under no_sync()"
            )
        lines, replicas = check()
        return lines, replicas

    def _send(self) -> None:
        grads = self._reducer.grads[self._sent]
        self._sent += 1
        if self._reducer.exchanges:
            error = self._reducer.send_and_free(grads, transient=self.early is not None)
            if self.early is not None:
                # Before the update all must know which params any rank has a gradient of, and
                # whether any has one that can't be used.
                flags = [*grads.present, error is not None]
                self._presence[grads] = self._communicator.start_union(flags)
            self._error = self._error or error
        else:
            self._update_in_place(grads)

    def _update_in_place(self, grads: BucketGrads) -> None:
        """Update a bucket whose gradients need no exchange: only on all ranks or on none."""
        error = self._reducer.take(grads)
        words = {"present": digest(bytes(grads.present))}
        try:
            seen = meet(self._communicator, Point.BACKWARD, words, error)
            if not seen["present"].agreed:
                raise not_the_same()
        except (ValueError, RuntimeError):
            self.failed = True
            raise
        self._landed(grads)
        grads.free()

    def _landed(self, grads: BucketGrads) -> None:
        """Update a bucket that this pass has reduced."""
        flags = self._presence.pop(grads, None)
        if self._reducer.exchanges and flags is None:
            return  # step() reduces what a no_sync() has left
        if flags is not None:
            *grads.present, failed = flags.wait()
            self.failed = self.failed or failed
        if not self.failed and any(grads.present):
            assert self.early is not None
            update = self.early.update()
            assert update is not None
            update([grads])
            # Not only when gathered: what of this pass has saved a param must not use it any more.
            torch.autograd.graph.increment_version(grads.updated_params())
        grads.updated, grads.shard = True, None

    def _end(self) -> None:
        """Reduce the buckets that did not fill (unused params), so that no rank waits for them."""
        while self._sent < len(self._reducer.grads):
            self._send()
        self._reducer.land()
        present = [present for grads in self._reducer.grads for present in grads.present]
        words = {"present": digest(bytes(present))}
        seen = meet(self._communicator, Point.BACKWARD_END, words, self._error)
        if not seen["present"].agreed:
            present = self._communicator.union(present)
        settle = self.early and self.early.settle()
        if settle is not None:
            settle()
        else:
            self._reducer.reduce(present)
        if self._reducer.keeps and self._pass is not None:
            # After DDP's own callback, which writes the gradients.
            torch.autograd.Variable._execution_engine.queue_callback(self._reducer.keep)
        self._pass = None


def _arrived(backward: weakref.ref[Backward], index: int, param: Tensor) -> None:
    """The hook on a param. It does not keep a discarded optimizer alive, and then does nothing."""
    alive = backward()
    if alive is not None:
        alive.on_grad(index)
