"""Reading and writing `state_dict()`: this rank's shards, and full tensors that it slices."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.entry_reader import EntryReader, Write, extent
from shardadam.kernels.state_formats import is_scale, per_element
from shardadam.params import view_like
from shardadam.shard_tensor import ShardTensor, nothing
from shardadam.shards import ParamShard, shard_of
from shardadam.shown_state import ShownState, is_ours, plain

_Places = Mapping[Tensor, tuple[FlatBucket, int]]


def ids_of(param_groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, int]:
    """The numbers that torch.optim gives params in a state dict."""
    ids: dict[Tensor, int] = {}
    first = 0
    for group in param_groups:
        # As torch numbers a param that is listed twice: by its first group, its last place there.
        ids = {param: index for index, param in enumerate(group["params"], first)} | ids
        first += len(group["params"])
    return ids


def pack(
    packed: dict[str, Any],
    ids: Mapping[Tensor, Any],
    places: _Places,
    communicator: Communicator,
    whole: Callable[[Any, str], Tensor | None] | None = None,
) -> dict[str, Any]:
    """``packed``, its tensors knowing which elements they hold: see [Note: checkpoints].

    Args:
        packed: torch's state dict.
        ids: the keys of its "state".
        places: where the params are.
        communicator: the ranks.
        whole: gives the full tensor of a key and a name, while it is known.
    """
    state = plain(packed["state"])
    for param, (bucket, index) in places.items():
        id = ids.get(param)
        if id not in state:
            continue
        if not bucket.exchanged:
            state[id] = {**state[id], **_spread_scales(bucket, index)}
        elif communicator.shards > 1:
            shard = shard_of(bucket, index)
            wrapped = {
                (shown := bucket.shown_name(index, name)): ShardTensor(
                    _pairs(shard, value),
                    extent(shard, name, communicator),
                    partial(whole, id, shown) if whole else nothing,
                )
                for name, value in shard.tensors.items()
            }
            state[id] = {**state[id], **wrapped}
    return {**packed, "state": state}


def _spread_scales(bucket: FlatBucket, index: int) -> dict[str, Tensor]:
    """A DTensor's scales as DTensors: per element, since blocks are of a rank's local tensor.

    So they mean the same however the param is distributed where they are read.
    """
    view = bucket.views[index]
    return {
        name: bucket.memory.shown(index, view_like(view, per_element(scale, view.numel())))
        for name, scale in bucket.owned_state(index).items()
        if is_scale(name)
    }


def _pairs(shard: ParamShard, value: Tensor) -> Tensor:
    """Complex where the param is."""
    return torch.view_as_complex(value.view(-1, 2)) if shard.param.is_complex() else value


def others(given: Mapping[str, Any]) -> dict[Any, Any]:
    """What the state in a state dict holds besides ours: users and hooks keep things there."""
    ids = {id for group in given["param_groups"] for id in group["params"]}
    kept: dict[Any, Any] = {}
    for key, value in given["state"].items():
        if key in ids:
            value = {name: item for name, item in value.items() if not is_ours(name)}
        if key not in ids or value:
            kept[key] = value
    return kept


def plan_load(
    param_groups: Sequence[Mapping[str, Any]],
    places: _Places,
    communicator: Communicator,
    given: Mapping[str, Any],
) -> list[Write]:
    """What is to be written to load ``given``; nothing is written yet.

    Raises:
        ValueError: an entry is missing or has the wrong shape; names the param.
    """
    params = itertools.chain.from_iterable(group["params"] for group in param_groups)
    writes: list[Write] = []
    saved = [(id, group) for group in given["param_groups"] for id in group["params"]]
    for (saved_id, saved_group), param in zip(saved, params, strict=True):
        entry = {
            name: value
            for name, value in given["state"].get(saved_id, {}).items()
            # What torch.distributed.checkpoint.state_dict makes of an entry that was not saved.
            if not (isinstance(value, Mapping) and not value)
        }
        if param not in places:
            if entry:
                warnings.warn(
                    f"param {saved_id} is frozen here: its state in the state dict is left out",
                    stacklevel=5,
                )
            continue
        reader = EntryReader(*places[param], communicator)
        writes += reader.scalars(entry)
        writes += reader.tensors(entry, bool(saved_group.get("amsgrad", False)))
    return writes


def plan_edits(
    state: Any, shown: ShownState, places: _Places, communicator: Communicator
) -> tuple[list[Write], list[str]]:
    """What is to be written for the buckets to hold ``state``, see [Note: state by hand].

    An entry that is missing or empty starts anew, as in torch. Nothing is written yet.

    Args:
        state: ``optimizer.state``, with what was put there.
        shown: what it was made.
        places: where the params are.
        communicator: the ranks.

    Returns:
        The writes, and for every param that was changed a line that says so.

    Raises:
        ValueError: something is missing or does not fit; names the param.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"optimizer.state: expected a dict, found {type(state).__name__}")
    writes: list[Write] = []
    lines: list[str] = []
    for param, (bucket, index) in places.items():
        views = shown.views[param]
        entry = state.get(param, {})
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"{bucket.names[index]}: expected a dict in optimizer.state, found "
                f"{type(entry).__name__}"
            )
        ours = {name: value for name, value in entry.items() if is_ours(name)}
        if ours.keys() == views.keys() and all(ours[k] is v for k, v in views.items()):
            continue
        edited = EntryReader(bucket, index, communicator, views).edits(entry)
        writes += edited.values()
        if edited:
            lines.append(f"the state of {bucket.names[index]} set by hand ({', '.join(edited)})")
    return writes, lines
