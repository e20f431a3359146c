"""A writer of the state dicts of apex's DistributedFusedAdam, for tests of reading them.

Apex itself needs CUDA and is not run here: this follows the layout that its source describes. What
is simulated is the bucketing (params in the order of their first gradients, fragments at multiples
of an alignment, equal shards of a bucket on each rank), the three ways of keeping a param, and the
pickles, which name classes nested in apex's own.
"""

import contextlib
import io
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MODULE = "apex.contrib.optimizers.distributed_fused_adam"


class DistributedFusedAdam:
    class StateBucket:
        pass

    class ParameterFragment:
        pass


for _class in (
    DistributedFusedAdam,
    DistributedFusedAdam.StateBucket,
    DistributedFusedAdam.ParameterFragment,
):
    _class.__module__ = MODULE


@contextlib.contextmanager
def apex_is_there() -> Iterator[None]:
    """While pickling: pickle looks classes up where they say they are."""
    parts = MODULE.split(".")
    names = [".".join(parts[: n + 1]) for n in range(len(parts))]
    modules = {name: types.ModuleType(name) for name in names}
    modules[MODULE].DistributedFusedAdam = DistributedFusedAdam
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@dataclass
class Trained:
    """One param: its values in the model, and flat fp32 master and moments.

    ``keeps``: what apex stores of it, "param", "remainder" or nothing.
    """

    values: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    keeps: str | None = "param"

    def in_memory(self, tensor: Tensor) -> Tensor:
        """Flat, as apex flattens a param."""
        if tensor.dim() == 4 and self.values.is_contiguous(memory_format=torch.channels_last):
            tensor = tensor.permute(0, 2, 3, 1)
        return tensor.reshape(-1)


def low_half(master: Tensor) -> Tensor:
    """A remainder: the low half of an fp32's bits."""
    return master.contiguous().view(torch.int16)[..., ::2] if master.numel() else master.short()


def v2(params: Sequence[Trained], groups: list[list[int]], options: list[dict], step: int) -> dict:
    """``groups``: of the numbers of ``params``, as ``options`` are of their options."""
    ids = [id for group in groups for id in group]
    state: dict[Any, Any] = {"step": step}
    for number, id in enumerate(ids):
        p = params[id]
        state[number] = {"param": p.master, "exp_avg": p.exp_avg, "exp_avg_sq": p.exp_avg_sq}
    return {"state": state, "param_groups": _groups(groups, options), "format": 2}


def _groups(groups: list[list[int]], options: list[dict]) -> list[dict]:
    first, made = 0, []
    for group, own in zip(groups, options, strict=True):
        made.append({**own, "params": list(range(first, first + len(group)))})
        first += len(group)
    return made


def v1_ranks(
    params: Sequence[Trained],
    groups: list[list[int]],
    options: list[dict],
    step: int,
    world_size: int,
    shard_size: int = 64,
    alignment: int = 32,
    old: bool = False,
) -> list[dict]:
    """What each rank returns without gathering; ``old``: before buckets had dtypes."""
    return [
        _rank(params, groups, options, step, rank, world_size, shard_size, alignment, old)
        for rank in range(world_size)
    ]


def _rank(
    params: Sequence[Trained],
    groups: list[list[int]],
    options: list[dict],
    step: int,
    rank: int,
    world_size: int,
    shard_size: int,
    alignment: int,
    old: bool,
) -> dict:
    bucket_size = shard_size * world_size
    buckets: list[Any] = []
    keeps: list[str | None] = []

    def make_bucket(trained: Trained) -> None:
        bucket = DistributedFusedAdam.StateBucket()
        bucket.bucket_size, bucket.shard_size, bucket.filled_size = bucket_size, shard_size, 0
        bucket.fragments, bucket.contiguous_buffer_offset = [], 0
        dtype = trained.exp_avg.dtype
        if not old:
            bucket.dtype = bucket.grad_sync_dtype = dtype
            bucket.param_sync_dtype, bucket.able_to_fill = trained.values.dtype, True
        bucket.exp_avg_shard = torch.zeros(shard_size, dtype=dtype)
        bucket.exp_avg_sq_shard = torch.zeros(shard_size, dtype=dtype)
        bucket.params_shard = bucket.param_remainders_shard = None
        if trained.keeps == "param":
            bucket.params_shard = torch.zeros(shard_size, dtype=dtype)
        if trained.keeps == "remainder":
            bucket.param_remainders_shard = torch.zeros(shard_size, dtype=torch.int16)
        buckets.append(bucket)
        keeps.append(trained.keeps)

    state: dict[Any, Any] = {"buckets": buckets, "step": step}
    places = [(g, p, id) for g, group in enumerate(groups) for p, id in enumerate(group)]
    # Backward reaches the last params first.
    for number, (group_id, param_id, id) in reversed(list(enumerate(places))):
        trained, fragments, param_start = params[id], [], 0
        while param_start < trained.values.numel():
            if not buckets or keeps[-1] != trained.keeps:
                make_bucket(trained)
            bucket = buckets[-1]
            bucket_start = -(-bucket.filled_size // alignment) * alignment
            size = min(trained.values.numel() - param_start, bucket_size - bucket_start)
            if size <= 0:
                make_bucket(trained)
                continue
            fragment = DistributedFusedAdam.ParameterFragment()
            fragment.param_group_id, fragment.param_id = group_id, param_id
            fragment.bucket_id = len(buckets) - 1
            fragment.param_range = (param_start, param_start + size)
            fragment.bucket_range = (bucket_start, bucket_start + size)
            start = min(max(bucket_start - shard_size * rank, 0), shard_size)
            end = min(max(bucket_start + size - shard_size * rank, 0), shard_size)
            fragment.in_local_shard = start < end
            fragment.shard_range = fragment.shard_bucket_range = fragment.shard_param_range = None
            if fragment.in_local_shard:
                inside = start + shard_size * rank
                first = inside - bucket_start + param_start
                fragment.shard_range = (start, end)
                fragment.shard_bucket_range = (inside, inside + end - start)
                fragment.shard_param_range = (first, first + end - start)
                _fill(bucket, trained, slice(start, end), slice(first, first + end - start))
            fragments.append(fragment)
            bucket.fragments.append(fragment)
            bucket.filled_size = bucket_start + size
            param_start += size
        state[number] = {"fragments": fragments}
    return {"state": state, "param_groups": _groups(groups, options)}


def _fill(bucket: Any, trained: Trained, there: slice, here: slice) -> None:
    master = trained.in_memory(trained.master)
    bucket.exp_avg_shard[there] = trained.in_memory(trained.exp_avg)[here]
    bucket.exp_avg_sq_shard[there] = trained.in_memory(trained.exp_avg_sq)[here]
    if bucket.params_shard is not None:
        bucket.params_shard[there] = master[here]
    if bucket.param_remainders_shard is not None:
        bucket.param_remainders_shard[there] = low_half(master)[here]


def gathered(ranks: list[Any]) -> dict:
    """As the root returns it: a file of bytes for each rank."""
    files = []
    for rank in ranks:
        file = io.BytesIO()
        with apex_is_there():
            torch.save(rank, file)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            files.append(torch.frombuffer(file.getvalue(), dtype=torch.uint8).clone())
    return {"gathered_states": files, "format": 1}


def save(value: Any, path: Any) -> None:
    with apex_is_there():
        torch.save(value, path)
