"""The only caller of torch.distributed: what sharded Adam says to its peers.

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
exact. What the host has to know is exchanged on the host, so that no rank waits for its GPU (but in
a process group that is not the default one and has no backend for CPU tensors).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.exchange import Exchange, Union, watch
from shardadam.kernels import reference

_TAGS = 1 << 30  # from here on: they must not pair with a user's sends
_Mean = Callable[[Sequence[Tensor], Tensor], None]


class Communicator:
    """This process among the ranks of ``process_group`` (None: the default one, if there is one).

    Attributes: ``rank`` and ``world_size`` within the group, ``backend`` its name ("none" when
    alone), ``device`` of the tensors, ``ordinal`` a number that no other optimizer of these ranks
    has, agreed on at construction, ``sent_bytes`` what this rank has sent so far, by what it was
    doing: payload, and what a tree or ring sends on average over the ranks. Descriptions, which
    only errors need, are not counted. ``mean`` is the backend's way to take the mean of shards.
    """

    _last_ordinal = 0
    _host_groups: ClassVar[WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]] = (
        WeakKeyDictionary()
    )
    _aside: ClassVar[WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]] = WeakKeyDictionary()

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        device: torch.device,
        mean: _Mean = reference.mean,
    ) -> None:
        self.process_group = process_group
        self._mean = mean
        self.rank, self.world_size, self.backend = 0, 1, "none"
        self.device = device
        self.ordinal = 0
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._divisors: dict[torch.dtype, Tensor] = {}
        self.sent_bytes: dict[str, int] = {}
        self._exchanges, self._point_to_point = 0, False
        self._stream: Any = None
        if process_group is None and not (dist.is_available() and dist.is_initialized()):
            return
        self.rank = dist.get_rank(process_group)
        if self.rank < 0:
            raise ValueError("process_group: this process is not one of its ranks")
        self.world_size = dist.get_world_size(process_group)
        # A group may have one backend per device type, "cpu:gloo,cuda:nccl".
        config = str(dist.get_backend_config(process_group))
        backends = dict(entry.split(":", 1) for entry in config.split(",") if ":" in entry)
        if backends and device.type not in backends:
            raise ValueError(
                f"params are on {device.type}, but the process group's backends are {config}; "
                f"expected one for {device.type}"
            )
        self.backend = backends.get(device.type, config)
        self._point_to_point = self.backend != "nccl" and device.type == "cpu"
        self._host_group, self._host_device = self._find_host_group(backends)

    def _find_host_group(
        self, backends: Mapping[str, str]
    ) -> tuple[dist.ProcessGroup | None, torch.device]:
        """The same ranks in a group that takes CPU tensors, if there can be one."""
        group, cpu = self.process_group, torch.device("cpu")
        if self.device.type == "cpu" or "cpu" in backends:
            return group, cpu
        world = dist.group.WORLD
        assert world is not None
        if group not in (None, world):
            return group, self.device  # another one can't always be made: see `aside`
        if world not in Communicator._host_groups:
            Communicator._host_groups[world] = dist.new_group(backend="gloo")
        return Communicator._host_groups[world], cpu

    def next_ordinal(self) -> int:
        """This rank's proposal for its ``ordinal``."""
        return Communicator._last_ordinal + 1

    def take_ordinal(self, largest_proposal: int) -> None:
        """Set ``ordinal`` once; no later one of this process will be as small."""
        if not self.ordinal:
            self.ordinal = Communicator._last_ordinal = largest_proposal

    def agree(self, words: Sequence[int]) -> tuple[list[int], list[int]]:
        """The smallest and the largest of every word over the ranks (63-bit integers).

        Where the two are equal the ranks agree. One small all-reduce; it opens every exchange, so
        that ranks that have come to different points find out instead of pairing the wrong data.
        """
        if self.world_size == 1:
            return list(words), list(words)
        both = torch.tensor([*words, *(-word for word in words)], device=self._host_device)
        with self._says("agreeing on what comes next", both, sends=2 * self._others(both)):
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._host_group)
        values = both.tolist()
        return [-value for value in values[len(words) :]], values[: len(words)]

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """Element by element, whether any rank's flag is set."""
        return self.start_union(flags).wait()

    def start_union(self, flags: Sequence[bool]) -> Union:
        """Begin a `union`; any number may be under way."""
        if self.world_size == 1:
            return Union(torch.tensor(flags), self._exchange("nothing", []))
        tensor = torch.tensor(flags, dtype=torch.uint8, device=self._host_device)
        doing, most = "exchanging which params have gradients", dist.ReduceOp.MAX
        sends = 2 * self._others(tensor)
        with self._says(doing, tensor, sends=sends):
            work = dist.all_reduce(tensor, op=most, group=self._host_group, async_op=True)
        return Union(tensor, self._exchange(doing, [work]))

    def _others(self, tensor: Tensor) -> int:
        """Bytes of ``tensor`` but this rank's shard of it: what reducing or gathering it sends."""
        return tensor.nbytes * (self.world_size - 1) // self.world_size

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's small object, in the order of the ranks; for error reports only."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._says("exchanging descriptions"):
            dist.all_gather_object(values, value, group=self._host_group)
        return values

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's ``data``, of any lengths, in the order of the ranks."""
        if self.world_size == 1:
            return [data]
        own = torch.tensor([len(data)], device=self._host_device)
        lengths = [torch.empty_like(own) for _ in range(self.world_size)]
        with self._says("exchanging bytes", sends=own.nbytes * (self.world_size - 1)):
            dist.all_gather(lengths, own, group=self._host_group)
            longest = max(int(length) for length in lengths)
            padded = torch.frombuffer(bytearray(data.ljust(longest + 1)), dtype=torch.uint8)
            padded = padded.to(self._host_device)
            gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
            for tensor in (own, padded, *lengths, *gathered):
                watch(tensor)
            self.sent_bytes["exchanging bytes"] += padded.nbytes * (self.world_size - 1)
            dist.all_gather(gathered, padded, group=self._host_group)
        hosts = [tensor.cpu() for tensor in gathered]
        return [
            ctypes.string_at(host.data_ptr(), int(length))
            for host, length in zip(hosts, lengths, strict=True)
        ]

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
            Communicator._aside[group] = dist.new_group(backend="gloo", **ranks)
        aside = Communicator(Communicator._aside[group], torch.device("cpu"))
        aside.ordinal = self.ordinal
        return aside

    def sum_exactly(self, words: Tensor) -> None:
        """Sum an int64 tensor over the ranks, in place."""
        if self.world_size > 1:
            with self._says("summing the gradient norm", words, sends=2 * self._others(words)):
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

    def start_reduce_scatter_mean(self, flat: Tensor, mean: Tensor, lane: int = 0) -> Exchange:
        """Begin to write the mean over the ranks of this rank's shard of ``flat`` to ``mean``.

        ``flat`` holds ``world_size`` shards of equal length and is left as it was; ``mean`` is one
        of fp32 (fp64 for fp64). Both are to be left alone until the exchange has been awaited.
        ``lane``: what goes on at the same time must differ in it; each has memory of its own.
        """
        world_size, doing = self.world_size, "reduce-scattering gradients"
        shards = _shards(flat, world_size)
        if world_size == 1 or not flat.numel():
            return self._exchange(doing, [], lambda: self._mean(shards, mean))
        if self.backend == "nccl" and flat.dtype == mean.dtype:
            with self._says(doing, sends=self._others(flat)):
                work = _reduce_scatter()(mean, flat, group=self.process_group, async_op=True)
            return self._exchange(doing, [work], lambda: mean.div_(self._divisor(mean.dtype)))
        name, sends = f"received {lane}", self._others(flat)
        if not self._point_to_point:
            buffer, group = self.buffer(name, flat.numel(), flat.dtype), self.process_group
            received = _shards(buffer, world_size)
            with self._says(doing, buffer, flat, sends=sends):
                works = [dist.all_to_all_single(buffer, flat, group=group, async_op=True)]
        else:
            own = shards[self.rank]  # read where it is
            buffer = self.buffer(name, flat.numel() - own.numel(), flat.dtype)
            theirs = _shards(buffer, world_size - 1)
            received = (*theirs[: self.rank], own, *theirs[self.rank :])
            with self._says(doing, *shards, *theirs, sends=sends):
                works = self._swap(shards, received)
        return self._exchange(doing, works, lambda: self._mean(received, mean))

    def _swap(self, shards: Sequence[Tensor], received: Sequence[Tensor]) -> list[dist.Work]:
        """Begin to send every other rank its one of ``shards``, and to receive one from each."""
        group, ranks, works = self.process_group, self.world_size, []
        # Other than those of all that is under way, in this optimizer or another.
        tag = _TAGS + (self.ordinal % 1024 << 16) + self._exchanges % (1 << 16)
        self._exchanges += 1
        for distance in range(1, ranks):
            to, source = (self.rank + distance) % ranks, (self.rank - distance) % ranks
            works += [
                dist.irecv(received[source], group=group, tag=tag, group_src=source),
                dist.isend(shards[to], group=group, tag=tag, group_dst=to),
            ]
        return [work for work in works if work is not None]  # None: not of the group

    def _divisor(self, dtype: torch.dtype) -> Tensor:
        """The world size, 0-dim: by a Python number, torch on CUDA multiplies by its reciprocal."""
        kept = self._divisors.get(dtype)
        if kept is None:
            kept = torch.full((), self.world_size, dtype=dtype, device=self.device)
            self._divisors[dtype] = kept
        return kept

    def start_all_gather(self, flat: Tensor) -> Exchange:
        """Begin to fill every rank's shard of ``flat`` from its owner; any number may be under way.

        It holds ``world_size`` shards of equal length, this rank's own being up to date, and is to
        be left alone until the exchange has been awaited.
        """
        doing, works = "all-gathering params", []
        if self.world_size > 1 and flat.numel():
            group, shards = self.process_group, _shards(flat, self.world_size)
            sends = self._others(flat)
            with self._says(doing, *shards, sends=sends):
                own = shards[self.rank]
                if self._point_to_point:
                    works = self._swap([own] * self.world_size, shards)
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
            On rank ``to`` a tensor for each of ``shards``, of all ranks' in their order, on the
            host, because a device that holds its share may not hold everybody's; else nothing.
        """
        if self.world_size == 1:
            return [shard.to("cpu", copy=True) for shard in shards]
        nccl = self.backend == "nccl"  # gloo sends from and receives on the host only
        group = self.process_group if nccl else self._host_group
        shards = [shard.to(self.device if nccl else self._host_device) for shard in shards]
        flats = []
        operations = []
        for shard in shards:
            if self.rank == to:
                flats.append(shard.new_empty(self.world_size * shard.numel()))
                for owner, part in enumerate(_shards(flats[-1], self.world_size)):
                    if owner == to:
                        part.copy_(shard)
                    else:
                        operations.append(dist.P2POp(dist.irecv, part, None, group, 0, owner))
            else:
                operations.append(dist.P2POp(dist.isend, shard, None, group, 0, to))
        operations = [operation for operation in operations if operation.tensor.numel()]
        if operations:
            sends = 0 if self.rank == to else sum(shard.nbytes for shard in shards)
            tensors = [operation.tensor for operation in operations]
            with self._says("gathering the state", *tensors, sends=sends):
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
        return [flat.cpu() for flat in flats]

    def _exchange(
        self, doing: str, works: Sequence[dist.Work], finish: Callable[[], object] | None = None
    ) -> Exchange:
        return Exchange(functools.partial(self._says, doing), works, finish)

    @contextlib.contextmanager
    def _says(self, doing: str, *tensors: Tensor, sends: int = 0) -> Iterator[None]:
        """Adds to torch.distributed's error what this optimizer was doing with ``tensors``.

        Exit waits until they are let go of, see [Note: tensors in flight].
        ``sends`` are the bytes for `sent_bytes`.
        """
        for tensor in tensors:
            watch(tensor)
        self.sent_bytes[doing] = self.sent_bytes.get(doing, 0) + sends
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.world_size} failed while {doing} over {self.backend} "
                f"(has a peer died?): {error}"
            ) from error


def _all_gather() -> Callable[..., Any]:
    """torch's, renamed in 2.13."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _reduce_scatter() -> Callable[..., Any]:
    """torch's, renamed in 2.13."""
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _shards(flat: Tensor, world_size: int) -> tuple[Tensor, ...]:
    return flat.view(world_size, flat.numel() // world_size).unbind()
