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
from shardadam.kernels.run import in_memory_order
from shardadam.shard_tensor import Extent, ShardTensor, extent_of
from shardadam.shards import ParamShard, shard_of, shards_of
from shardadam.shown_state import ShownState, plain

_Places = Mapping[Tensor, tuple[FlatBucket, int]]
Write = Callable[[], object]

# What a param's entry may hold of ours: the rest is somebody else's.
_OURS = frozenset(
    ("step", "mu_product", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "remainder")
)


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
) -> dict[str, Any]:
    """``packed``, its tensors knowing which elements they hold: see [Note: checkpoints].

    ``ids``: the keys of its "state".
    """
    state = plain(packed["state"])
    if communicator.world_size == 1:
        return {**packed, "state": state}
    for shard in shards_of(places):
        id = ids.get(shard.param)
        if id in state:
            extent = _extent(shard, communicator)
            tensors = {name: _pairs(shard, value) for name, value in shard.tensors.items()}
            wrapped = {name: ShardTensor(value, extent) for name, value in tensors.items()}
            state[id] = {**state[id], **wrapped}
    return {**packed, "state": state}


def _extent(shard: ParamShard, communicator: Communicator) -> Extent:
    reals = 2 if shard.param.is_complex() else 1
    return extent_of(
        shard.param.shape,
        shard.dims,
        shard.offset // reals,
        shard.numel // reals,
        communicator.rank,
        communicator.world_size,
    )


def _pairs(shard: ParamShard, value: Tensor) -> Tensor:
    """Complex where the param is."""
    return torch.view_as_complex(value.view(-1, 2)) if shard.param.is_complex() else value


def others(given: Mapping[str, Any]) -> dict[Any, Any]:
    """What the state in a state dict holds besides ours: users and hooks keep things there."""
    ids = {id for group in given["param_groups"] for id in group["params"]}
    kept: dict[Any, Any] = {}
    for key, value in given["state"].items():
        if key in ids:
            value = {name: item for name, item in value.items() if name not in _OURS}
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
        reader = _Reader(*places[param], communicator)
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
        if entry.keys() & _OURS == views.keys() and all(entry[k] is v for k, v in views.items()):
            continue
        reader = _Reader(bucket, index, communicator, views["exp_avg"].shape)
        edited = reader.edits(entry, views)
        writes += edited.values()
        if edited:
            lines.append(f"the state of {bucket.names[index]} set by hand ({', '.join(edited)})")
    return writes, lines


class _Reader:
    """Reads one param's entry; tensors of the shape ``local`` are this rank's elements."""

    def __init__(
        self,
        bucket: FlatBucket,
        index: int,
        communicator: Communicator,
        local: torch.Size | None = None,
    ) -> None:
        self._bucket = bucket
        self._index = index
        self._piece = bucket.pieces[index]
        self._name = bucket.names[index]
        self._extent = _extent(shard_of(bucket, index), communicator)
        self._local = local
        self._whole = self._piece.numel == bucket.bucket.spans[index].numel

    def scalars(self, entry: Mapping[str, Any]) -> list[Write]:
        """Writes for "step" and its like; older torch versions saved floats."""
        return [
            partial(values[self._index].fill_, float(entry.get(name, values.new_tensor(initial))))
            for name, values in self._bucket.scalars.items()
            for initial in (self._bucket.initial_scalars[name],)
        ]

    def tensors(self, entry: Mapping[str, Any], amsgrad: bool) -> list[Write]:
        """Writes for the sharded tensors."""
        names = list(self._bucket.state)
        if (amsgrad or "max_exp_avg_sq" in entry) and "max_exp_avg_sq" not in names:
            names.append("max_exp_avg_sq")
        return [partial(self._write, name, self._value(name, entry)) for name in names]

    def edits(self, entry: Mapping[str, Any], views: Mapping[str, Tensor]) -> dict[str, Write]:
        """Writes for what is no longer one of ``views``, by name."""
        names = [*self._bucket.scalars, *self._bucket.state]
        if "max_exp_avg_sq" in entry and "max_exp_avg_sq" not in names:
            names.append("max_exp_avg_sq")
        names = [name for name in names if name not in views or entry.get(name) is not views[name]]
        if not entry:
            writes = [*self.scalars({}), *self.tensors({}, False)]
            return dict(zip(names, writes, strict=True))
        edits: dict[str, Write] = {}
        for name in names:
            if name in self._bucket.scalars:
                edits[name] = self._scalar_edit(name, entry)
            else:
                value = self._value(name, entry)
                # What was put there may be a view of what another write changes.
                edits[name] = partial(self._write, name, None if value is None else value.clone())
        return edits

    def _scalar_edit(self, name: str, entry: Mapping[str, Any]) -> Write:
        value = entry.get(name)
        if not isinstance(value, float | int) and not (
            isinstance(value, Tensor) and value.numel() == 1
        ):
            found = "nothing" if value is None else type(value).__name__
            raise ValueError(f"{self._name}: expected a number for {name!r}, found {found}")
        return partial(self._bucket.scalars[name][self._index].fill_, float(value))

    def _value(self, name: str, entry: Mapping[str, Any]) -> Tensor | None:
        """This rank's elements of one state tensor; None for zeros."""
        if name in entry and not self._is_stale(name, entry[name]):
            return self._own(name, entry[name])
        if name == "master":
            return self._bucket.shard_piece(self._index)
        if not entry or name == "remainder":
            return None
        if name == "max_exp_avg_sq":
            # Saved without AMSGrad: the largest so far is not known, the latest is a bound.
            return self._own(name, entry["exp_avg_sq"])
        where = "the state dict" if self._local is None else "optimizer.state"
        raise ValueError(f"{self._name}: {where} has no {name!r} for it")

    def _is_stale(self, name: str, value: Any) -> bool:
        """Whether torch.optim has had it, which casts what it loads and does not update it."""
        return (
            name in ("master", "remainder")
            and isinstance(value, Tensor)
            and value.dtype != self._bucket.state[name].dtype
        )

    def _write(self, name: str, value: Tensor | None) -> None:
        if name not in self._bucket.state:
            self._bucket.add_state(name)
        piece = self._piece
        target = self._bucket.state[name][piece.shard_offset : piece.shard_offset + piece.numel]
        target.zero_() if value is None else target.copy_(value)

    def _own(self, name: str, value: Any) -> Tensor:
        """This rank's elements of a saved tensor, whether full or already sharded."""
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{self._name}: expected a tensor for {name!r}, found {type(value).__name__}"
            )
        if isinstance(value, ShardTensor):
            return self._own_shard(name, value)
        if hasattr(value, "device_mesh"):
            raise ValueError(
                f"{self._name}: {name} is a DTensor; expected its full_tensor(), or a checkpoint "
                "that torch.distributed.checkpoint loads into this optimizer"
            )
        if value.shape == self._local and not self._whole:
            return value
        if value.shape != self._bucket.params[self._index].shape:
            raise ValueError(
                f"{self._name}: expected {name} of shape {self._extent.shape}, "
                f"found {tuple(value.shape)}"
            )
        return in_memory_order(self._bucket.piece_of(self._piece, value))

    def _own_shard(self, name: str, value: ShardTensor) -> Tensor:
        saved, here = value.extent, self._extent
        if not saved.same_elements(here):
            raise ValueError(
                f"{self._name}: {name} was saved by rank {saved.rank} of {saved.world_size} as "
                f"{saved}; this is rank {here.rank} of {here.world_size} and owns {here}. Expected "
                "the same layout; torch.distributed.checkpoint reads any, as does every rank what "
                "consolidate_state_dict() returns"
            )
        local = value.local
        return torch.view_as_real(local).flatten() if local.is_complex() else local
