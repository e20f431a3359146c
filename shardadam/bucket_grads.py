"""The gradients of one bucket, as they are read from ``param.grad``."""

import itertools
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from shardadam import dtensors
from shardadam.buffers import FlatBucket
from shardadam.kernels.run import state_dtype
from shardadam.params import describe
from shardadam.replicas import Replicas

_grad = attrgetter("grad")
_kind = attrgetter("dtype", "shape", "device", "layout")


class BucketGrads:
    """The gradients of one bucket.

    ``local``: ``param.grad`` of every span, when last looked at. ``present``: for each span,
    whether any rank has a gradient (after the reduction). ``shard``: this rank's shard of the mean,
    or None where ``param.grad`` is read in place. ``updated``: the params have been, in backward.
    """

    def __init__(self, bucket: FlatBucket) -> None:
        self.bucket = bucket
        self.local: list[Tensor | None] = [None] * len(bucket.params)
        self.present = [False] * len(bucket.params)
        self.shard: Tensor | None = None
        self.updated = False
        self._kinds = [_kind(view) for view in bucket.views]
        self._memory: Tensor | None = None

    def look(self) -> None:
        """Read ``param.grad`` of every span: what follows goes by what it was here."""
        self.local = list(map(_grad, self.bucket.params))

    def memory(self) -> Tensor:
        """Memory for `shard`. Kept: fresh shards between freed gradients fragment the heap."""
        if self._memory is None:
            bucket = self.bucket
            self._memory = torch.empty(
                bucket.bucket.shard_numel, dtype=state_dtype(bucket.dtype), device=bucket.device
            )
        return self._memory

    def misfit(self) -> tuple[int, Exception] | None:
        """The first span whose gradient can't be used, and why.

        autograd and the setter of .grad see to most of it; a param changed by .data slips through.
        """
        present = [grad for grad in self.local if grad is not None]
        if len(present) == len(self.local) and list(map(_kind, present)) == self._kinds:
            return None
        kinds = [None if grad is None else _kind(grad) for grad in self.local]
        for index, (kind, expected) in enumerate(zip(kinds, self._kinds, strict=True)):
            grad = self.local[index]
            if grad is not None and kind != expected:
                return index, _misfit(self.bucket.names[index], self.bucket.params[index], grad)
        return None

    def owned(self) -> list[int]:
        """The spans of which this rank owns elements that have a gradient."""
        return [
            index
            for index, piece in enumerate(self.bucket.pieces)
            if piece.numel and self.present[index]
        ]

    def in_place(self, index: int) -> Tensor:
        """This rank's piece of the ``param.grad`` of span ``index``, where there is no `shard`."""
        grad = self.local[index]
        assert grad is not None
        return self.bucket.owned_part(index, grad)

    def counted(self) -> list[int]:
        """Those of `owned` whose elements count on this rank in a sum over all."""
        return self.owned()

    def versions(self) -> list[tuple[Tensor, int] | None]:
        """Every gradient that was looked at, kept alive, and how often it has been written."""
        return [None if grad is None else (grad, grad._version) for grad in self.local]

    def misplaced(self) -> list[str]:
        """The gradients that `place` will bring to this rank, a line each."""
        return []

    def place(self, *, compare: bool) -> None:
        """Bring gradients that are distributed otherwise than their params to where those are.

        ``compare``: what several ranks have must be the same.
        """

    def updated_params(self) -> list[Tensor]:
        """The params that have a gradient on any rank, after the reduction."""
        return list(itertools.compress(self.bucket.params, self.present))

    def free(self) -> None:
        """Free the full gradients that were looked at."""
        for param, grad in zip(self.bucket.params, self.local, strict=True):
            if grad is not None:
                param.grad = None
        self.local = [None] * len(self.local)

    def clear(self) -> None:
        """Forget everything."""
        self.local = [None] * len(self.bucket.params)
        self.present = [False] * len(self.bucket.params)
        self.shard = None
        self.updated = False


class DistributedGrads(BucketGrads):
    """Those of DTensors; ``local`` are their local tensors.

    FSDP2 has averaged them, and they are distributed like their params. A backward pass through
    tensor parallelism may leave them otherwise, such as sums of which each rank has a term.
    """

    def __init__(self, bucket: FlatBucket, replicas: Replicas) -> None:
        super().__init__(bucket)
        self._replicas = replicas
        self._specs = [param._spec for param in bucket.params]  # type: ignore[attr-defined]
        self._sizes = [(view.dtype, view.numel()) for view in bucket.views]
        self._regular = False
        self._seen: list[Tensor | None] = []
        self._odd: dict[int, Any] = {}

    def look(self) -> None:
        """As in `BucketGrads`."""
        grads: list[Any] = list(map(_grad, self.bucket.params))
        # Nearly always the specs are those objects; what is done per param adds up.
        self._regular = [getattr(grad, "_spec", None) for grad in grads] == self._specs
        if self._regular:
            self._odd, self.local = {}, [*dtensors.locals_of(grads)]
        else:
            self._odd = {
                index: grad
                for index, (grad, param) in enumerate(zip(grads, self.bucket.params, strict=True))
                if grad is not None and not dtensors.same_placement(grad, param)
            }
            self.local = [None if grad is None else dtensors.local_of(grad) for grad in grads]
        self._seen = grads

    def misfit(self) -> tuple[int, Exception] | None:
        """As in `BucketGrads`."""
        local = [grad for grad in self.local if grad is not None]
        if self._regular and [(grad.dtype, grad.numel()) for grad in local] == self._sizes:
            return None
        for index, grad in self._odd.items():
            param: Any = self.bucket.params[index]
            if not dtensors.same_mesh(grad, param) or _kind(grad) != _kind(param):
                return index, _misfit(self.bucket.names[index], param, grad)
        if not self._odd:
            return super().misfit()
        kept, self.local = self.local, [*self.local]
        for index in self._odd:
            self.local[index] = None
        found = super().misfit()
        self.local = kept
        return found

    def counted(self) -> list[int]:
        """As in `BucketGrads`: replicas count once."""
        return [index for index in self.owned() if self._replicas.counts[index]]

    def versions(self) -> list[tuple[Tensor, int] | None]:
        """As in `BucketGrads`. Operations on DTensors do not count as writes to local ones."""
        return [
            None if grad is None else (grad, grad._version + dtensors.local_of(grad)._version)
            for grad in self._seen
        ]

    def misplaced(self) -> list[str]:
        """As in `BucketGrads`."""
        return [
            f"the gradient of {self.bucket.names[index]} as {describe(grad)}"
            for index, grad in self._odd.items()
        ]

    def place(self, *, compare: bool) -> None:
        """As in `BucketGrads`. Collective over the meshes; over all ranks, the first time."""
        if self._odd:
            self.local = [*self.local]
            for index, grad in self._odd.items():
                param: Any = self.bucket.params[index]
                self.local[index] = dtensors.redistributed(grad, param)
            self._odd = {}
        if compare and self._replicas.elsewhere:
            self._replicas.compare_gradients(self.local)


def grads_of(bucket: FlatBucket, replicas: Replicas | None) -> BucketGrads:
    """The gradients of ``bucket``; ``replicas``: who else has the elements of DTensors."""
    return BucketGrads(bucket) if replicas is None else DistributedGrads(bucket, replicas)


def _misfit(name: str, param: Tensor, grad: Tensor) -> Exception:
    if grad.layout is not torch.strided:
        return RuntimeError(
            f"{name}: Adam does not support sparse gradients, please consider SparseAdam instead"
        )
    return ValueError(
        f"{name}: expected a gradient like the param, {describe(param)}; found {describe(grad)}"
    )
