"""Gradients that are the same at every world size: summed over microbatches by one tree.

Every backward pass is one microbatch. At its end its gradients are taken out of ``param.grad`` into
fp32 (fp64 for fp64 params) and summed with those before, see [Note: the tree over microbatches].
`step()` brings the sums of blocks to the owners of their shards, who add them up and divide by the
number of microbatches.

A param without a gradient in a microbatch is not a term of the sum there. It is filled with -0,
which changes no bit of what it is added to, as +0 would of -0.
"""

import functools
import itertools
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.gradients import GradReducer
from shardadam.kernels.run import state_dtype
from shardadam.replicas import Replicas
from shardadam.tree_sum import TreeSum, blocks


class MicrobatchReducer(GradReducer):
    """All buckets' gradients, of ``microbatches`` of a step over all ranks, each having as many."""

    def __init__(self, communicator: Communicator, microbatches: int) -> None:
        super().__init__(communicator, "mean", shard_grads=False)
        self._hint = False
        self._microbatches = microbatches
        self._each = microbatches // communicator.world_size
        self._tree = TreeSum()
        self._passes = 0
        self._pass: int | None = None  # autograd's id of the backward pass under way
        self._error: Exception | None = None

    def add(self, placed: Mapping[FlatBucket, Replicas | None]) -> None:
        """As in `GradReducer`."""
        super().add(placed)
        this = weakref.ref(self)
        for bucket in placed:
            for param in bucket.params:
                if param.requires_grad:
                    hook = functools.partial(_arrived, this)
                    param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            if self._passes:
                self._error = ValueError(
                    f"{bucket.names[0]} came to the optimizer between the backward passes of a "
                    "step, whose first ones have not been taken from it: expected zero_grad(), and "
                    "step() after unfreezing a param and before the first of them"
                )
        self._tree = TreeSum()  # of lists as long as there are buckets

    def on_grad(self) -> None:
        """A gradient has been accumulated by the backward pass under way."""
        under_way = torch._C._current_graph_task_id()
        if self._pass != under_way:
            self._refuse_torn_pass()
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
            self._pass = under_way

    @torch.no_grad()
    def _end(self) -> None:
        """Take the gradients of one microbatch."""
        self._pass = None
        errors = [self.take(grads) for grads in self.grads]
        self._error = self._error or next(filter(None, errors), None)
        if self._passes < self._each and self._error is None:  # else step() will raise
            number = self._communicator.rank * self._each + self._passes
            flats = self._tree.free.pop() if self._tree.free else self._flats()
            for grads, flat in zip(self.grads, flats, strict=True):
                grads.bucket.pack(grads.local, flat)
                for span, grad in zip(grads.bucket.bucket.spans, grads.local, strict=True):
                    if grad is None:
                        flat[span.offset : span.offset + span.numel].fill_(-0.0)
            self._tree.append(range(number, number + 1), flats)
        self._passes += 1
        for grads in self.grads:
            grads.free()

    def _flats(self) -> list[Tensor]:
        return [
            torch.empty(
                grads.bucket.bucket.numel,
                dtype=state_dtype(grads.bucket.dtype),
                device=grads.bucket.device,
            )
            for grads in self.grads
        ]

    def _refuse_torn_pass(self) -> None:
        if self._pass is not None and self._error is None:
            self._error = RuntimeError(
                "a backward pass was broken off, or has another inside it, and its gradients are "
                "no microbatch's: expected zero_grad() after an error, and no "
                "checkpoint(use_reentrant=True)"
            )

    def clear(self) -> None:
        """As in `GradReducer`."""
        super().clear()
        self._tree.clear()
        self._passes, self._pass, self._error = 0, None, None

    def check(self, differentiable: bool) -> None:
        """As in `GradReducer`; also for another number of backward passes than asked for."""
        super().check(differentiable)
        self._refuse_torn_pass()
        if self._error is not None:
            raise self._error
        for grads in self.grads:
            for name, grad in zip(grads.bucket.names, grads.local, strict=True):
                if grad is not None:
                    raise ValueError(
                        f"{name} has a gradient that came in no backward pass: expected none that "
                        "is set by hand with exact_microbatches, and zero_grad() after"
                    )
        if self._passes not in (0, self._each):
            raise ValueError(
                f"exact_microbatches={self._microbatches} on {self._communicator.world_size} "
                f"ranks: expected {self._each} backward passes on each before step(), found "
                f"{self._passes}"
            )

    def lines(self) -> list[str]:
        """As in `GradReducer`."""
        return [f"{self._passes} backward passes before this"]

    def presence(self) -> list[bool]:
        """As in `GradReducer`: in any microbatch."""
        return [present for grads in self.grads for present in grads.present]

    def versions(self) -> list[tuple[Tensor, int] | None]:
        """As in `GradReducer`: of the shards."""
        return self.shard_versions()

    def reduce(self, present: list[bool], rescale: Tensor | None = None) -> None:
        """As in `GradReducer`."""
        assert rescale is None, "GradScaler has found no gradients, and that was an error"
        if any(grads.shard is not None for grads in self.grads):
            return  # by a clip_grad_norm_() that raised
        flags = iter(present)
        for index, grads in enumerate(self.grads):
            grads.present = list(itertools.islice(flags, len(grads.present)))
            if any(grads.present):
                grads.shard = grads.memory()
                total = self._sum_of(index)
                # 0-dim: by a Python number, torch on CUDA multiplies by its reciprocal.
                torch.div(total, torch.full_like(total[0], self._microbatches), out=grads.shard)

    def _sum_of(self, index: int) -> Tensor:
        """This rank's shard of the sum of bucket ``index`` over all microbatches. Collective."""
        ranks, each = self._communicator, self._each
        held = [
            list(blocks(range(rank * each, (rank + 1) * each))) for rank in range(ranks.world_size)
        ]
        own = [flats[index] for _, flats in self._tree.blocks]
        # Who has fewer blocks sends its last one again, which nobody reads.
        rounds = [own[min(n, len(own) - 1)] for n in range(max(map(len, held)))]
        exchanges = [ranks.start_all_to_all(flat, lane) for lane, flat in enumerate(rounds)]
        for _, exchange in exchanges:
            exchange.wait()
        tree = TreeSum()
        for rank, of_rank in enumerate(held):
            for number, block in enumerate(of_rank):
                tree.append(block, [exchanges[number][0][rank]])
        return tree.total()[0]


def _arrived(reducer: weakref.ref[MicrobatchReducer], param: Tensor) -> None:
    """The hook on a param. It does not keep a discarded optimizer alive, and then does nothing."""
    alive = reducer()
    if alive is not None:
        alive.on_grad()
