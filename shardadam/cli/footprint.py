"""What training takes per rank, in bytes: from the optimizer's own layout, nothing is allocated."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from shardadam.candidates import Candidate, master_of
from shardadam.cli.links import SPREADS, Traffic, Transport, Ways, traffic
from shardadam.gradients import LANES
from shardadam.kernels.run import state_dtype
from shardadam.layout import Bucket
from shardadam.options import Memory, Options, formats
from shardadam.placement import plan
from shardadam.storage import DeviceMemory, Storage

Grads = Literal["plain", "shard_grads", "update_in_backward"]
GRADS: tuple[Grads, ...] = ("plain", "shard_grads", "update_in_backward")
MEMORIES: tuple[Memory, ...] = ("full", "lean", "leanest")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on the rank that has most, at the peak; all ranks' shards are equally long.

    ``params``: with padding, frozen params and the model's buffers. ``grads``: ``param.grad`` and
    the shard of their mean. ``state``: moments and masters. ``transients``: buckets in transit.
    """

    params: int
    grads: int
    state: int
    transients: int
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it: activations and gradients are counted as if at their peak at one time."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to train on ``ways.world_size`` ranks."""

    dtype: str
    grads: Grads
    memory: Memory
    ways: Ways
    footprint: Footprint
    traffic: Traffic

    @property
    def world_size(self) -> int:
        """How many ranks."""
        return self.ways.world_size

    @property
    def sent(self) -> int:
        """Bytes per rank and step."""
        return self.traffic.sent


_Buckets = Sequence[tuple[Bucket, Storage]]


class Trained:
    """A model to be trained; its tensors may be on the meta device.

    ``params``: with their names, in the order of registration. ``fixed``: what it has besides.
    """

    def __init__(self, params: Sequence[tuple[str, Tensor]], fixed: Sequence[Tensor] = ()) -> None:
        frozen = [param for _, param in params if not param.requires_grad]
        self.fixed_bytes = sum(tensor.nbytes for tensor in [*fixed, *frozen])
        self.candidates = [Candidate(p, name, 0, False) for name, p in params if p.requires_grad]

    @property
    def numel(self) -> int:
        """Of the params that are trained."""
        return sum(candidate.param.numel() for candidate in self.candidates)

    def plans(
        self,
        dtype: str,
        world_size: int,
        transport: Transport,
        bucket_bytes: int,
        activations: int,
        nodes: int = 1,
    ) -> list[Plan]:
        """Of every mode, those that ask least of the program first.

        ``dtype`` names what the params are; ``transport``: what moves gradients and params. On
        several ``nodes``, of every mode with each way to spread it over them.

        Raises:
            ValueError: a param that can't be optimized.
        """
        spreads = SPREADS if nodes > 1 else SPREADS[:1]
        all_ways = [Ways(spread, nodes, world_size // nodes) for spread in spreads]
        found = []
        for memory in MEMORIES:
            try:
                laid_out = [self._lay_out(memory, ways, bucket_bytes) for ways in all_ways]
            except ValueError:
                if memory == "full":
                    raise
                continue  # float64, complex and float16 params have no coded state
            for grads, (ways, buckets) in itertools.product(
                GRADS, zip(all_ways, laid_out, strict=True)
            ):
                if grads == "shard_grads" and world_size == 1:
                    continue  # there is nobody to share them with
                flat = sum(bucket.numel * how.dtype.itemsize for bucket, how in buckets)
                state = [s.sizes(s.tensors(s.amsgrad), b.shard_numel) for b, s in buckets]
                footprint = Footprint(
                    params=self.fixed_bytes + flat,
                    grads=self._grads(buckets, grads, world_size),
                    state=sum(map(sum, state)),
                    transients=_transients(buckets, grads, ways, transport),
                    activations=activations,
                )
                moved = traffic(buckets, ways, transport)
                found.append(Plan(dtype, grads, memory, ways, footprint, moved))
        return found

    def _lay_out(
        self, memory: Memory, ways: Ways, bucket_bytes: int
    ) -> list[tuple[Bucket, Storage]]:
        state, master = formats(memory, "fp32", "auto")
        options = Options(
            process_group=None,
            mesh=None,
            replicate_state=False,
            grad_sync="mean",
            shard_grads=False,
            update_in_backward=False,
            max_grad_norm=None,
            state=state,
            master=master,
            offload=None,
            bucket_bytes=bucket_bytes,
            seed=0,
        )
        device = self.candidates[0].param.device
        masters = [master_of(candidate, device, options) for candidate in self.candidates]
        memory_of = DeviceMemory(device)
        return plan(self.candidates, masters, ways.shards, options, memory_of, ways.parts)

    def _grads(self, buckets: _Buckets, grads: Grads, world_size: int) -> int:
        """``param.grad`` and the shards of their mean that are kept."""
        shards = sum(_shard(bucket, storage) for bucket, storage in buckets)
        if grads == "plain":
            full = sum(sum(s.numel for s in b.spans) * how.dtype.itemsize for b, how in buckets)
            return full + (shards if world_size > 1 else 0)
        filling = max(self._filling(bucket, storage) for bucket, storage in buckets)
        return filling + (shards if grads == "shard_grads" else 0)

    def _filling(self, bucket: Bucket, storage: Storage) -> int:
        """The gradients in memory when the last one of ``bucket`` arrives.

        What one module's backward makes it makes at a time, also what goes into the next bucket.
        """
        last = min(span.param for span in bucket.spans)
        module = _module(self.candidates[last].name)
        beside = itertools.takewhile(
            lambda c: module and _module(c.name) == module, reversed(self.candidates[:last])
        )
        numel = sum(span.numel for span in bucket.spans) + sum(c.param.numel() for c in beside)
        return numel * storage.dtype.itemsize


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _shard(bucket: Bucket, storage: Storage) -> int:
    return bucket.shard_numel * state_dtype(storage.dtype).itemsize


def _transients(buckets: _Buckets, grads: Grads, ways: Ways, transport: Transport) -> int:
    """What `GradReducer.send` and `Communicator.start_reduce_scatter_mean` keep for a lane each."""
    flat, by_ranks = ways.spread == "flat", transport == "gloo"
    if ways.world_size == 1:
        return 0
    most: dict[tuple[str, int, torch.dtype], int] = {}
    for index, (bucket, storage) in enumerate(buckets):
        lane, dtype = index % LANES, storage.dtype
        packed = bucket.numel * dtype.itemsize
        peers = ways.world_size if flat else ways.places
        received = packed
        if by_ranks:
            received -= packed // peers  # its own is read where it is
        elif dtype == state_dtype(dtype) or peers == 1:
            received = 0  # NCCL sums it
        early = grads == "update_in_backward"
        mean = _shard(bucket, storage) if early else 0
        node_sum = 0 if flat else bucket.numel * state_dtype(dtype).itemsize // ways.places
        crossed = node_sum * (ways.nodes - 1) // ways.nodes if by_ranks else 0
        sums = {"mean": mean, "node sum": node_sum, "crossed": crossed}
        for name, nbytes in {"packed": packed, "received": received, **sums}.items():
            key = (name, lane, state_dtype(dtype) if name in sums else dtype)
            most[key] = max(most.get(key, 0), nbytes)
    return sum(most.values())
