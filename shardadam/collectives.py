"""Of those who call torch.distributed (`ranks`, `alarm`), what sharded Adam sends to its peers.

`Communicator` is bound to one process group; a world of one needs no process group and sends
nothing. Algorithms are chosen by backend, from measurements (docs/performance.md):

* gloo's reduce-scatter is an all-reduce, its all-to-all copies also the shard that stays, its
  all-gather stages through temporaries, and broadcasts of the shards use one direction of a link
  at a time: sends from each rank to each, with a local sum for gradients, are two to three times as
  fast. They need tensors on the host; elsewhere all-to-all and broadcasts do.
* NCCL's own reduce-scatter and all-gather work in place, on a stream of its own that waits for,
  and is awaited by, the current one on the device. It sums 16-bit gradients in 16 bits, so these
  go by an all-to-all and a local sum. It has not been run on GPUs yet.

Gradients are summed in fp32 (fp64 for fp64), by gloo in the order of the ranks, so that a sum is
the same on every run, and divided by the world size after: a multiplication by a rounded 1/W is not
exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.exchange import Exchange
from shardadam.kernels import reference
from shardadam.ranks import Ranks


class Mean(Protocol):
    """How a backend takes the mean of shards."""

    def __call__(self, shards: Sequence[Tensor], out: Tensor, divisor: int | None = None) -> None:
        """As `reference.mean`."""


class Communicator(Ranks):
    """What is exchanged of params, gradients and state with the ranks of a process group.

    Attributes:
        shards: how many every bucket is cut into.
        shard: which one this rank owns.
        replicas: how many ranks own each.
        replica: which of those this rank is.
        gathers_alone: whether a rank that awaits a gather needs nothing of others than that they
            have begun it.

    Args:
        process_group: as in `Ranks`.
        device: likewise.
        mean: the backend's way to take the mean of shards.
        where: which ranks these are among all, for errors and `sent_bytes`.
    """

    gathers_alone = True

    _aside: ClassVar[WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]] = WeakKeyDictionary()

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        device: torch.device,
        mean: Mean = reference.mean,
        where: str = "",
    ) -> None:
        super().__init__(process_group, device)
        self.shards, self.shard = self.world_size, self.rank
        self.replicas, self.replica = 1, 0
        self._mean, self._where = mean, where
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._stream: Any = None

    def aside(self) -> Communicator:
        """The same ranks on the host, in a gloo group of their own. Collective the first time.

        For another thread: what it exchanges can't pair with what this one does.

        Raises:
            RuntimeError: torch can't make that group; on every rank.
        """
        if self.world_size == 1:
            return self
        world = dist.group.WORLD
        group = self.process_group or world
        assert group is not None
        if group not in Communicator._aside:
            ranks: dict[str, Any] = {}
            if group is not world:
                # Without the other ranks, torch names a group after how many its maker is in:
                # where that differs, each would wait for a group of another name.
                low, high = self.agree([len(dist.distributed_c10d._world.pg_names)])
                if low != high:
                    raise RuntimeError(
                        "another process group of these ranks can't be made, because they belong "
                        f"to different numbers of groups ({low[0]} to {high[0]}): expected as many "
                        "on each, or an optimizer on the default group, or save() for async_save()"
                    )
                ranks = {"ranks": dist.get_process_group_ranks(group)}
                ranks["use_local_synchronization"] = True
            Communicator._aside[group] = dist.new_group(
                backend="gloo", timeout=self.timeout, **ranks
            )
        aside = Communicator(Communicator._aside[group], torch.device("cpu"))
        aside.ordinal, aside.flight.phases = self.ordinal, self.flight.phases
        return aside

    def sum_exactly(self, words: Tensor) -> None:
        """Sum an int64 tensor over the ranks, in place."""
        if self.world_size > 1:
            doing = f"summing the gradient norm{self._where}"
            with self._says(doing, words, sends=2 * self._others(words)):
                dist.all_reduce(words, group=self.process_group)

    def minimum(self, tensor: Tensor) -> None:
        """Take the smallest over the ranks, in place."""
        sends = 2 * self._others(tensor)
        with self._says("agreeing on the loss scale", tensor, sends=sends):
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.process_group)

    def maximum(self, tensor: Tensor) -> None:
        """Take the largest over the ranks, in place."""
        sends = 2 * self._others(tensor)
        with self._says("agreeing on whether to skip", tensor, sends=sends):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.process_group)

    def broadcast(self, tensor: Tensor) -> None:
        """Give every rank the first rank's tensor."""
        if self.world_size > 1 and tensor.numel():
            with self._says("broadcasting the params", sends=self._others(tensor)):
                dist.broadcast(tensor, group=self.process_group, group_src=0)

    def buffer(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Scratch memory that is kept and reused: fresh memory costs a page fault per 4 KiB."""
        if self.device.type == "cuda":
            # Hooks run on the streams of their forward passes: the last one may still use this.
            stream = torch.cuda.current_stream(self.device)
            if self._stream not in (None, stream):
                stream.wait_stream(self._stream)
            self._stream = stream
        kept = self._buffers.get((name, dtype))
        if kept is None or kept.numel() < numel:
            kept = torch.empty(numel, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = kept
        return kept[:numel]

    def start_reduce_scatter_mean(
        self, flat: Tensor, mean: Tensor, lane: int = 0, divisor: int | None = None
    ) -> Exchange:
        """Begin to write the mean over the ranks of this rank's shard of ``flat`` to ``mean``.

        ``flat`` holds ``shards`` of equal length and is left as it was; ``mean`` is one of fp32
        (fp64 for fp64). Both are to be left alone until the exchange has been awaited.
        ``lane``: what goes on at the same time must differ in it; each has memory of its own.
        ``divisor``: what the sum is divided by, if not ``world_size``.
        """
        world_size, doing = self.world_size, f"reduce-scattering gradients{self._where}"
        divisor = divisor or world_size
        shards = cut(flat, world_size)
        if world_size == 1 or not flat.numel():
            return self._exchange(doing, [], lambda: self._mean(shards, mean, divisor))
        if self.backend == "nccl" and flat.dtype == mean.dtype:
            with self._says(doing, sends=self._others(flat)):
                work = _reduce_scatter()(mean, flat, group=self.process_group, async_op=True)
            # 0-dim: by a Python number, torch on CUDA multiplies by its reciprocal.
            divide_by = torch.full_like(mean[0], divisor)
            return self._exchange(doing, [work], lambda: mean.div_(divide_by))
        received, works = self._start_all_to_all(doing, flat, lane)
        return self._exchange(doing, works, lambda: self._mean(received, mean, divisor))

    def start_all_to_all(self, flat: Tensor, lane: int = 0) -> tuple[Sequence[Tensor], Exchange]:
        """Begin to bring every rank's shard of ``flat`` to its owner.

        ``flat`` and ``lane`` as in `start_reduce_scatter_mean`.

        Returns:
            This rank's shard of every rank's ``flat``, in their order, once the exchange has been
            awaited; its own may be a view of it.
        """
        doing = "exchanging sums of microbatches"
        if self.world_size == 1 or not flat.numel():
            return cut(flat, self.world_size), self._exchange(doing, [])
        received, works = self._start_all_to_all(doing, flat, lane)
        return received, self._exchange(doing, works)

    def _start_all_to_all(
        self, doing: str, flat: Tensor, lane: int
    ) -> tuple[Sequence[Tensor], list[dist.Work]]:
        shards, sends = cut(flat, self.world_size), self._others(flat)
        if not self._point_to_point:
            group = self.process_group
            buffer = self.buffer(f"received {lane}", flat.numel(), flat.dtype)
            with self._says(doing, buffer, flat, sends=sends):
                work = dist.all_to_all_single(buffer, flat, group=group, async_op=True)
            return cut(buffer, self.world_size), [work]
        own = shards[self.rank]  # read where it is
        buffer = self.buffer(f"received {lane}", flat.numel() - own.numel(), flat.dtype)
        theirs = cut(buffer, self.world_size - 1)
        received = (*theirs[: self.rank], own, *theirs[self.rank :])
        with self._says(doing, *shards, *theirs, sends=sends):
            works = self._swap(shards, received, self.process_group, self._next_tag())
        return received, works

    def start_all_gather(self, flat: Tensor, what: str = "params") -> Exchange:
        """Begin to fill every shard of ``flat`` from its owner; any number may be under way.

        It holds ``shards`` of equal length, this rank's own being up to date, and is to be left
        alone until the exchange has been awaited. ``what`` it is, for errors and `sent_bytes`.
        """
        doing, works = f"all-gathering {what}{self._where}", []
        if self.world_size > 1 and flat.numel():
            group, shards = self.process_group, cut(flat, self.world_size)
            sends = self._others(flat)
            with self._says(doing, *shards, sends=sends):
                own = shards[self.rank]
                if self._point_to_point:
                    group, tag = self.process_group, self._next_tag()
                    works = self._swap([own] * self.world_size, shards, group, tag)
                elif self.backend == "nccl":
                    works = [_all_gather()(flat, own, group=group, async_op=True)]
                else:
                    works = [
                        dist.broadcast(shard, group=group, group_src=owner, async_op=True)
                        for owner, shard in enumerate(shards)
                    ]
        return self._exchange(doing, works)

    def all_gather(self, flats: Sequence[Tensor]) -> None:
        """As `start_all_gather` of each, and await them all."""
        for exchange in [self.start_all_gather(flat) for flat in flats]:
            exchange.wait()

    def gather(self, shards: Sequence[Tensor], to: int) -> list[Tensor]:
        """Bring every rank's ``shards`` to rank ``to`` of the group; all are under way at once.

        Args:
            shards: this rank's, of the same lengths on every rank.
            to: the receiver.

        Returns:
            On rank ``to`` a tensor for each of ``shards``, of all shards in their order, on the
            host, because a device that holds its share may not hold everybody's; else nothing.
        """
        if self.world_size == 1:
            return [shard.to("cpu", copy=True) for shard in shards]
        nccl = self.backend == "nccl"  # gloo sends from and receives on the host only
        group = self.process_group if nccl else self._host_group
        owners = self._owners(to)
        shards = [shard.to(self.device if nccl else self._host_device) for shard in shards]
        flats = []
        operations = []
        for shard in shards:
            if self.rank == to:
                flats.append(shard.new_empty(self.shards * shard.numel()))
                for owner, part in zip(owners, cut(flats[-1], self.shards), strict=True):
                    if owner == to:
                        part.copy_(shard)
                    else:
                        operations.append(dist.P2POp(dist.irecv, part, None, group, 0, owner))
            elif self.rank in owners:
                operations.append(dist.P2POp(dist.isend, shard, None, group, 0, to))
        operations = [operation for operation in operations if operation.tensor.numel()]
        if any(shard.numel() for shard in shards):  # counted by all, also who has nothing to send
            tensors = [operation.tensor for operation in operations]
            sends = 0 if self.rank == to else sum(tensor.nbytes for tensor in tensors)
            with self._says("gathering the state", *tensors, sends=sends):
                for work in dist.batch_isend_irecv(operations) if operations else ():
                    work.wait()
        return [flat.cpu() for flat in flats]

    def _owners(self, to: int) -> list[int]:
        """The rank that sends each shard to rank ``to`` when state is gathered."""
        return list(range(self.world_size))

    def describe(self) -> str:
        """This rank among the others, for the user."""
        return f"rank {self.rank} of {self.world_size} ({self.backend})"


def _all_gather() -> Callable[..., Any]:
    """torch's, renamed in 2.13."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _reduce_scatter() -> Callable[..., Any]:
    """torch's, renamed in 2.13."""
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def cut(flat: Tensor, count: int) -> tuple[Tensor, ...]:
    """``flat`` as ``count`` parts of equal length."""
    return flat.view(count, flat.numel() // count).unbind()
