"""From candidates to buckets: laid out on every rank alike, or not at all."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardadam.agreement import Point, digest, first_difference, meet
from shardadam.buffers import FlatBucket
from shardadam.candidates import Candidate, master_of, refuse_shared_memory
from shardadam.collectives import Communicator
from shardadam.kernels.state_formats import FORMATS
from shardadam.layout import ALIGNMENT, Bucket, Entry, plan_buckets
from shardadam.options import Options
from shardadam.params import DistributedParams, FlatParams, Params, real_dtype, real_numel
from shardadam.replicas import Replicas, bit_sum
from shardadam.storage import StateMemory, Storage


def block_numbers(param_groups: Sequence[dict[str, Any]]) -> dict[Tensor, int]:
    """The number of every param's first block of ALIGNMENT elements: random bits go by it.

    Group by group and dtype by dtype, last registered first as in the buckets, so that what lies
    side by side in one is numbered on. Frozen params have numbers too: a param has the same
    whenever it is unfrozen, whatever the world size and the buckets.
    """
    numbers: dict[Tensor, int] = {}
    first = 0
    for group in param_groups:
        dtypes = dict.fromkeys(param.dtype for param in group["params"])
        for dtype in dtypes:
            for param in reversed(group["params"]):
                if param.dtype == dtype and param not in numbers:
                    numbers[param] = first
                    first += -(-real_numel(param) // ALIGNMENT)
    return numbers


def check_betas(param_groups: Sequence[dict[str, Any]], state: str) -> None:
    """Raise ValueError for betas with which no ratio of moments is bounded, if they are coded.

    A block's scale would be that of an element without gradients, and all others' codes 0.
    """
    if not FORMATS[state].has_scales:
        return
    for index, group in enumerate(param_groups):
        beta1, beta2 = map(float, group["betas"])
        if beta1 and beta1 * beta1 >= beta2:
            raise ValueError(
                f"betas of group {index} are ({beta1}, {beta2}): state={state!r} needs beta1 "
                'squared to be less than beta2, expected such betas or state="bf16"'
            )


def hyperparameters(param_groups: Sequence[dict[str, Any]], names: Iterable[str]) -> list[str]:
    """What of every group must be equal on every rank, a line each.

    Only ``names``: a group may hold whatever else its owner put there.
    """
    return [
        f"{name}={_plain(group.get(name))} in group {index}"
        for index, group in enumerate(param_groups)
        for name in names
    ]


def _plain(value: object) -> object:
    """A hyperparameter as something that ranks can compare without waiting for a device."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))  # a tensor's own repr is rounded
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return f"a tensor of shape {tuple(value.shape)}"
        return value.item() if value.device.type == "cpu" else "a tensor on the device"
    return value


@torch.no_grad()
def place(
    candidates: Sequence[Candidate],
    numbers: Mapping[Tensor, int],
    settings: Sequence[str],
    scalars: dict[str, float],
    communicator: Communicator,
    options: Options,
    memory: StateMemory,
    *,
    scalars_on_device: bool,
) -> dict[FlatBucket, Replicas | None]:
    """Lay out ``candidates`` and take their storage over. Collective.

    Every rank then has the first rank's values, as under DDP.

    Args:
        candidates: what to lay out; the same on every rank.
        numbers: those of `block_numbers`.
        settings: hyperparameters and options, a line each; the same on every rank.
        scalars: the per-param scalars of the state and their initial values.
        communicator: the ranks.
        options: the optimizer's.
        memory: where the state is to be.
        scalars_on_device: whether the scalars are where the params are, or on the host.

    Returns:
        The buckets, and who else has the elements of those of DTensors.

    Raises:
        ValueError: a param that can't be optimized, or one that differs between ranks; every rank
            raises.
        OSError: there is no room for the state; other ranks raise RuntimeError. Nothing has been
            taken over.
    """
    buckets: list[tuple[Bucket, Storage]] = []
    error: Exception | None = None
    try:
        options.check_world_size(communicator.world_size)
        masters = [master_of(candidate, communicator.device, options) for candidate in candidates]
        refuse_shared_memory(candidates)
        _refuse_dtensors(candidates, options)
        shards, parts = communicator.shards, communicator.replicas
        buckets = plan(candidates, masters, shards, options, memory, parts)
        memory.reserve(
            [
                size
                for bucket, how in buckets
                for size in how.sizes(how.tensors(how.amsgrad), bucket.shard_numel)
            ]
        )
    except (ValueError, OSError) as caught:
        error = caught
    lines = [*map(str, candidates), *settings]
    words = {"layout": digest("\n".join(lines)), "ordinal": communicator.next_ordinal()}
    seen = meet(communicator, Point.CONSTRUCTION, words, error)
    communicator.take_ordinal(seen["ordinal"].high)
    if not seen["layout"].agreed:
        difference = first_difference(communicator.exchange(lines))
        raise ValueError(
            f"expected the same params and hyperparameters on every rank: {difference}"
        )

    members = [[candidates[span.param] for span in bucket.spans] for bucket, _ in buckets]
    replicas = [
        Replicas([c.param for c in of_one], [c.name for c in of_one], communicator)
        if of_one[0].distributed
        else None
        for of_one in members
    ]
    flat_buckets = []
    for (bucket, storage), of_one, alike in zip(buckets, members, replicas, strict=True):
        params, names = [c.param for c in of_one], [c.name for c in of_one]
        shard = communicator.shard if alike is None else 0
        where: Params = (
            FlatParams(bucket, params, names, shard, storage.dtype)
            if alike is None
            else DistributedParams(params, names)
        )
        flat_buckets.append(
            FlatBucket(
                bucket,
                where,
                [where.first_block(index, numbers[param]) for index, param in enumerate(params)],
                shard,
                storage,
                scalars,
                scalars_on_device=scalars_on_device,
            )
        )
    _share_values([bucket for bucket in flat_buckets if bucket.exchanged], communicator)
    return dict(zip(flat_buckets, replicas, strict=True))


def plan(
    candidates: Sequence[Candidate],
    masters: Sequence[str | None],
    shards: int,
    options: Options,
    memory: StateMemory,
    parts: int = 1,
) -> list[tuple[Bucket, Storage]]:
    """The buckets of ``candidates``, and how the state of each is stored.

    ``shards`` and ``parts``: as in `plan_buckets`.
    """
    buckets: list[tuple[Bucket, Storage]] = []
    keys = [
        (real_dtype(candidate.param), candidate.amsgrad, master, candidate.distributed)
        for candidate, master in zip(candidates, masters, strict=True)
    ]
    for key in dict.fromkeys(keys):
        dtype, amsgrad, master, distributed = key
        entries = [
            Entry(index, candidate.group, real_numel(candidate.local))
            for index, candidate in enumerate(candidates)
            if keys[index] == key
        ]
        form = FORMATS[options.state]
        storage = Storage(dtype, form, master, amsgrad, options.seed, memory)
        if distributed:  # one bucket, whatever a rank's own part of params is
            planned = plan_buckets(entries, sys.maxsize, 1)
        else:
            numel = options.bucket_bytes // dtype.itemsize
            planned = plan_buckets(entries, numel, shards, parts)
        buckets += [(bucket, storage) for bucket in planned]
    # In the order in which backward completes them, also across dtypes.
    buckets.sort(key=lambda planned: -min(span.param for span in planned[0].spans))
    return buckets


def _refuse_dtensors(candidates: Sequence[Candidate], options: Options) -> None:
    for candidate in candidates:
        if candidate.distributed and options.mesh is not None:
            raise ValueError(
                f"{candidate.name} is a DTensor, whose own mesh says where its elements are: "
                "expected mesh=None (docs/fsdp2.md)"
            )


def _share_values(buckets: Sequence[FlatBucket], communicator: Communicator) -> None:
    """Give every rank the first rank's values, unless that would hide a difference in order."""
    if communicator.world_size == 1:
        return
    sums = []
    names = []
    for bucket in buckets:
        for name, span in zip(bucket.names, bucket.bucket.spans, strict=True):
            values = bucket.memory.flat[span.offset : span.offset + span.numel]
            sums.append(bit_sum(values))
            names.append(name)
    words = {"values": digest(str(sums)), "sorted values": digest(str(sorted(sums)))}
    seen = meet(communicator, Point.CONSTRUCTION, words)
    if seen["sorted values"].agreed and not seen["values"].agreed:
        lines = [f"{name} (sum of bits {value})" for name, value in zip(names, sums, strict=True)]
        difference = first_difference(communicator.exchange(lines))
        raise ValueError(
            "the same params stand in another order on another rank: "
            f"{difference}. Expected one order on every rank"
        )
    for bucket in buckets:
        communicator.broadcast(bucket.memory.flat)
        bucket.fill_masters()
