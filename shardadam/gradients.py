"""Gradients, from ``param.grad`` of every rank to what the update reads.

Where they need no exchange (one rank, or ``grad_sync="none"``) they are read from ``param.grad`` in
place. Otherwise each bucket is packed and reduce-scattered: in `step()`, or, with
``shard_grads=True``, inside backward as soon as the bucket's last gradient has arrived, after
which the full gradients are freed.
"""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from shardadam.agreement import Point, Range, digest, meet
from shardadam.buffers import FlatBucket, describe
from shardadam.collectives import Communicator
from shardadam.kernels.run import state_dtype


class BucketGrads:
    """The gradients of one bucket.

    ``present``: for each span, whether any rank has a gradient (after the reduction). ``shard``:
    this rank's shard of the mean, or None where ``param.grad`` is read in place. ``arrived`` of
    ``expected`` params have got their gradient in the backward pass under way.
    """

    def __init__(self, bucket: FlatBucket) -> None:
        self.bucket = bucket
        self.present = [False] * len(bucket.params)
        self.shard: Tensor | None = None
        self.arrived = 0
        self.expected = 0
        self._memory: Tensor | None = None

    def shard_memory(self) -> Tensor:
        """Memory for `shard`. Kept: fresh shards between freed gradients fragment the heap."""
        if self._memory is None:
            bucket = self.bucket
            self._memory = bucket.shard.new_empty(
                bucket.bucket.shard_numel, dtype=state_dtype(bucket.dtype)
            )
        return self._memory

    def local(self) -> list[Tensor | None]:
        """``param.grad`` of every span."""
        return [param.grad for param in self.bucket.params]

    def owned(self) -> list[int]:
        """The spans of which this rank owns elements that have a gradient."""
        return [
            index
            for index, piece in enumerate(self.bucket.pieces)
            if piece.numel and self.present[index]
        ]

    def in_place(self, index: int) -> Tensor:
        """This rank's piece of the ``param.grad`` of span ``index``, where there is no `shard`."""
        return self.bucket.grad_in_place(index)

    def clear(self) -> None:
        """Forget everything."""
        self.present = [False] * len(self.bucket.params)
        self.shard = None
        self.arrived = 0


class GradReducer:
    """All buckets' gradients. ``exchanges``: they are averaged here; ``eager``: during backward."""

    def __init__(self, communicator: Communicator, grad_sync: str, shard_grads: bool) -> None:
        self.exchanges = grad_sync == "mean" and communicator.world_size > 1
        self.eager = self.exchanges and shard_grads
        self.grads: list[BucketGrads] = []
        self._communicator = communicator
        self._syncing = True
        self._held = False  # gradients have been left in param.grad by no_sync()
        self._error: Exception | None = None  # for the end of the backward pass under way
        self._backward: int | None = None  # autograd's id of the backward pass under way
        self._hint = self.exchanges
        self._launched = 0  # buckets whose reduction has been started in this backward pass

    def add(self, buckets: list[FlatBucket]) -> None:
        """Take charge of more buckets."""
        this = weakref.ref(self)
        for bucket in buckets:
            index = len(self.grads)
            self.grads.append(BucketGrads(bucket))
            if self.eager:
                for param in bucket.params:
                    if param.requires_grad:
                        hook = functools.partial(_arrived, this, index)
                        param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Forget reduced gradients; ``param.grad`` is not touched."""
        self._held = False
        for grads in self.grads:
            grads.clear()

    def check(self, differentiable: bool) -> None:
        """Raise if a gradient can't be used; names the param.

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
            bucket = grads.bucket
            for index, (kind, grad) in enumerate(zip(bucket.kinds, grads.local(), strict=True)):
                if grad is not None and not _fits(kind, grad):
                    raise _misfit(bucket.names[index], bucket.params[index], grad)
        if self.eager and not self._held:
            for grads in self.grads:
                for name, done, grad in zip(
                    grads.bucket.names, grads.present, grads.local(), strict=True
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
            for present, grad in zip(grads.present, grads.local(), strict=True)
        ]

    def updated(self) -> list[Tensor]:
        """The params that have a gradient on any rank, after `reduce`."""
        return [
            param
            for grads in self.grads
            for param, present in zip(grads.bucket.params, grads.present, strict=True)
            if present
        ]

    def unreduced(self) -> bool:
        """Whether gradients wait in ``param.grad`` although backward should have reduced them."""
        return self.eager and any(
            grad is not None for grads in self.grads for grad in grads.local()
        )

    def fingerprint(self) -> int:
        """Of this rank's first gradient, until the ranks have been compared; 0 if all zero."""
        if not self._hint or _capturing():
            return 0
        for grads in self.grads:
            for grad in grads.local():
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
        gradients = (
            grads.shard if self.eager else grad for grads in self.grads for grad in grads.local()
        )
        return [None if grad is None else (grad, grad._version) for grad in gradients]

    def changed_since(self, versions: list[tuple[Tensor, int] | None]) -> str | None:
        """The name of the first param whose gradient is not what it was at `versions`."""
        names = [name for grads in self.grads for name in grads.bucket.names]
        if self.eager:
            for name, grad in zip(names, (g for b in self.grads for g in b.local()), strict=True):
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
        offset = 0
        for grads in self.grads:
            count = len(grads.present)
            grads.present = present[offset : offset + count]
            offset += count
            if self.exchanges and not self.eager and any(grads.present):
                self._reduce_bucket(grads, rescale)

    def reduce_leftovers(self) -> None:
        """With ``shard_grads``: reduce what no backward pass has (a `no_sync()`, a hand-made grad).

        Entered by every rank, whether it has leftovers or not.
        """
        for grads in self.grads:
            self._reduce_bucket(grads)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients pile up in ``param.grad`` in backward passes under this context."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def on_grad(self, index: int) -> None:
        """A gradient of bucket ``index`` has been accumulated by the backward pass under way."""
        if not self._syncing:
            self._held = True
            return
        backward = torch._C._current_graph_task_id()
        if self._backward != backward:
            # Also after a backward pass that was broken off by an exception.
            self._backward = backward
            self._launched = 0
            self._error = None
            for grads in self.grads:
                grads.arrived = 0
                grads.expected = sum(param.requires_grad for param in grads.bucket.params)
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            meet(self._communicator, Point.BACKWARD)
        self.grads[index].arrived += 1
        # The buckets' order is the layout's, whatever the order in which they fill: every rank
        # must reduce the same bucket at the same time.
        while self._launched < len(self.grads):
            if self.grads[self._launched].arrived < self.grads[self._launched].expected:
                break
            self._launch()

    def _launch(self) -> None:
        self._reduce_bucket(self.grads[self._launched])
        self._launched += 1

    def _end_backward(self) -> None:
        """Reduce the buckets that did not fill (unused params), so that no rank waits for them."""
        self._backward = None
        while self._launched < len(self.grads):
            self._launch()
        present = [present for grads in self.grads for present in grads.present]
        words = {"present": digest(bytes(present))}
        seen = meet(self._communicator, Point.BACKWARD_END, words, self._error)
        if not seen["present"].agreed:
            present = self._communicator.union(present)
        self.reduce(present)

    @torch.no_grad()
    def _reduce_bucket(self, grads: BucketGrads, rescale: Tensor | None = None) -> None:
        bucket = grads.bucket
        local = grads.local()
        if self.eager:
            for index, (name, param) in enumerate(zip(bucket.names, bucket.params, strict=True)):
                grad = local[index]
                if grad is not None and not _fits(bucket.kinds[index], grad):
                    # The others wait in the exchange: join them, and raise when all meet.
                    self._error = self._error or _misfit(name, param, grad)
                    local[index] = None
        packed = self._communicator.buffer("packed", bucket.bucket.numel, bucket.dtype)
        bucket.pack(local, packed)
        if rescale is not None:
            packed.mul_(rescale)
        memory = grads.shard_memory()
        if grads.shard is None or not self.eager:
            self._communicator.reduce_scatter_mean(packed, memory)
            grads.shard = memory
        else:  # another backward pass of the same step
            more = self._communicator.buffer("mean", memory.numel(), memory.dtype)
            self._communicator.reduce_scatter_mean(packed, more)
            grads.shard += more
        if not self.eager:
            return
        for index, (param, grad) in enumerate(zip(bucket.params, local, strict=True)):
            if grad is not None:
                grads.present[index] = True
                param.grad = None


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _arrived(reducer: "weakref.ref[GradReducer]", index: int, param: Tensor) -> None:
    """The hook on a param. It does not keep a discarded optimizer alive, and then does nothing."""
    alive = reducer()
    if alive is not None:
        alive.on_grad(index)


def _fits(kind: tuple[torch.dtype, torch.Size, torch.device], grad: Tensor) -> bool:
    """Whether a gradient is dense and of its param's dtype, shape and device.

    autograd and the setter of .grad see to most of it; a param changed by .data slips through.
    """
    dtype, shape, device = kind
    return (
        grad.dtype is dtype
        and grad.shape == shape
        and grad.device == device
        and grad.layout is torch.strided
    )


def _misfit(name: str, param: Tensor, grad: Tensor) -> Exception:
    if grad.layout is not torch.strided:
        return RuntimeError(
            f"{name}: Adam does not support sparse gradients, please consider SparseAdam instead"
        )
    return ValueError(
        f"{name}: expected a gradient like the param, {describe(param)}; found {describe(grad)}"
    )
