"""Reading and writing `state_dict()`: this rank's shards, and full tensors that it slices."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.kernels.run import in_memory_order

_Places = Mapping[Tensor, tuple[FlatBucket, int]]
Write = Callable[[], object]

# What a param's entry may hold of ours: the rest is somebody else's.
_OURS = frozenset(
    ("step", "mu_product", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "remainder")
)


def shard_of(
    param_groups: Sequence[Mapping[str, Any]],
    places: _Places,
    communicator: Communicator,
    *,
    by_param: bool = False,
) -> dict[str, Any]:
    """Which elements a state dict holds: the rank, and per param id ``(first, number)``.

    ``by_param``: by the param itself, as in `Optimizer.__getstate__`.
    """
    ids: dict[Tensor, Any] = {}
    first = 0
    for group in param_groups:
        # As torch numbers a param that is listed twice: by its first group, its last place there.
        ids = {param: index for index, param in enumerate(group["params"], first)} | ids
        first += len(group["params"])
    if by_param:
        ids = {param: param for param in ids}
    return {
        "rank": communicator.rank,
        "world_size": communicator.world_size,
        "ranges": {
            ids[param]: (piece.param_offset, piece.numel)
            for param, (bucket, index) in places.items()
            if param in ids  # a user may have taken it out of its group
            for piece in (bucket.pieces[index],)
        },
    }


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
    shard = given.get("shard")
    writes: list[Write] = []
    saved = [(id, group) for group in given["param_groups"] for id in group["params"]]
    for (saved_id, saved_group), param in zip(saved, params, strict=True):
        entry = given["state"].get(saved_id, {})
        if param not in places:
            if entry:
                warnings.warn(
                    f"param {saved_id} is frozen here: its state in the state dict is left out",
                    stacklevel=5,
                )
            continue
        bucket, index = places[param]
        reader = _Reader(bucket, index, saved_id, shard, communicator)
        writes += reader.scalars(entry)
        writes += reader.tensors(entry, bool(saved_group.get("amsgrad", False)))
    return writes


class _Reader:
    """Reads one param's entry."""

    def __init__(
        self,
        bucket: FlatBucket,
        index: int,
        saved_id: int,
        shard: Mapping[str, Any] | None,
        communicator: Communicator,
    ) -> None:
        self._bucket = bucket
        self._index = index
        self._piece = bucket.pieces[index]
        self._name = bucket.names[index]
        self._range = None if shard is None else shard["ranges"].get(saved_id)
        self._shard = shard
        self._communicator = communicator

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

    def _value(self, name: str, entry: Mapping[str, Any]) -> Tensor | None:
        """This rank's elements of one state tensor; None for zeros."""
        if name in entry:
            return self._own(name, entry[name])
        if name == "master":
            return self._bucket.shard_piece(self._index)
        if not entry or name == "remainder":
            return None
        if name == "max_exp_avg_sq":
            # Saved without AMSGrad: the largest so far is not known, the latest is a bound.
            return self._own(name, entry["exp_avg_sq"])
        raise ValueError(f"{self._name}: the state dict has no {name!r} for it")

    def _write(self, name: str, value: Tensor | None) -> None:
        if name not in self._bucket.state:
            self._bucket.add_state(name)
        piece = self._piece
        target = self._bucket.state[name][piece.shard_offset : piece.shard_offset + piece.numel]
        target.zero_() if value is None else target.copy_(value)

    def _own(self, name: str, value: Tensor) -> Tensor:
        """This rank's elements of a saved tensor, whether full or already sharded."""
        param, piece = self._bucket.params[self._index], self._piece
        if value.shape == param.shape:
            return in_memory_order(self._bucket.piece_of(piece, value))
        if self._shard is not None and value.dim() == 1:
            saved = (self._shard["rank"], self._shard["world_size"])
            here = (self._communicator.rank, self._communicator.world_size)
            if saved == here and tuple(self._range or ()) == (piece.param_offset, piece.numel):
                return value
            raise ValueError(
                f"{self._name}: {name} was saved by rank {saved[0]} of {saved[1]} as elements "
                f"(first, number) {self._range}; this is rank {here[0]} of {here[1]} and owns "
                f"{(piece.param_offset, piece.numel)}. Expected the same layout"
            )
        raise ValueError(
            f"{self._name}: expected {name} of shape {tuple(param.shape)}, "
            f"found {tuple(value.shape)}"
        )
