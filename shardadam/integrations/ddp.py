"""DistributedDataParallel: its buckets reduce-scattered by the optimizer, and uneven inputs.

    model = DistributedDataParallel(model)
    optimizer = shardadam.AdamW(model.parameters())
    model.register_comm_hook(optimizer, ddp.reduce_scatter)

Without the hook DDP all-reduces the gradients, and the optimizer then averages what is equal
already: right, and 3P elements on the wire where 2P do.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.join import Joinable, JoinHook

from shardadam.optimizer import ShardedOptimizer


def reduce_scatter(
    optimizer: ShardedOptimizer, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """A communication hook: the optimizer reduces a bucket beside the rest of the backward pass.

    ``param.grad`` stays this rank's own: clip by ``max_grad_norm`` or ``optimizer.clip_grad_norm_``
    and change no gradients between backward and `step()`; that is an error there.

    Raises:
        ValueError: the optimizer has no gradients to average, or frees them.
    """
    first, last = bucket.index() == 0, bucket.is_last()
    optimizer._backward.on_ddp_bucket(bucket.parameters(), first=first, last=last)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class Joined(Joinable):
    """The optimizer, for ranks that run out of inputs, in `torch.distributed`'s `Join`.

        with Join([model, ddp.Joined(optimizer)]):

    A rank without inputs takes part in every `step()`, with gradients of zero that count in the
    mean, as DDP's do. The hook `reduce_scatter` has to be registered.
    """

    def __init__(self, optimizer: ShardedOptimizer) -> None:
        super().__init__()
        self._optimizer = optimizer

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a rank does instead."""
        return _Shadow(self._optimizer)

    @property
    def join_device(self) -> torch.device:
        """Where the params are."""
        return self._optimizer._communicator.device

    @property
    def join_process_group(self) -> Any:
        """The ranks."""
        return self._optimizer._communicator.process_group or dist.group.WORLD


class _Shadow(JoinHook):
    def __init__(self, optimizer: ShardedOptimizer) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        """The step of an iteration that other ranks have had inputs for."""
        self._optimizer.step()
        self._optimizer.zero_grad()
