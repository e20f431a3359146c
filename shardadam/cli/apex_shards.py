"""The deprecated layout ("v1") of apex's DistributedFusedAdam: what each rank holds, put together.

[Note: apex's shards]

A rank's dict has, in "state", the step, a list of *buckets* and for every param its *fragments*::

    param 7  [--- fragment of bucket 0 ---|--- fragment of bucket 1 ---]     param_range
    bucket 0 [ rank 0's shard | rank 1's shard ]                             one shard a rank

A bucket object holds this rank's 1-D shards: exp_avg_shard, exp_avg_sq_shard, and of the param
either all in the optimizer's dtype (params_shard), or 16-bit remainders (param_remainders_shard),
or nothing. A fragment that is in this rank's shard has ``shard_range`` (there) and
``shard_param_range`` (in the flat param). Both are instances of classes nested in the optimizer's,
which pickle names by ``getattr``: stand-ins take their place here, which hold attributes and do
nothing, and so does one for getattr itself, which knows these two names.
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli.plain_load import load_plain
from shardadam.cli.tensors import is_dense

_PARTS = {
    "exp_avg_shard": "exp_avg",
    "exp_avg_sq_shard": "exp_avg_sq",
    "params_shard": "param",
    "param_remainders_shard": "remainder",
}
_DTYPES = {False: (torch.float32, torch.float16, torch.bfloat16), True: (torch.int16,)}
_Piece = tuple[int, dict[str, Tensor]]
"""Where in the flat param, and its parts there."""


class _Optimizer:
    """For DistributedFusedAdam, of which nothing but the nested classes is wanted."""


class _Bucket:
    """For DistributedFusedAdam.StateBucket."""


class _Fragment:
    """For DistributedFusedAdam.ParameterFragment."""


_NESTED = {"StateBucket": _Bucket, "ParameterFragment": _Fragment}


def _nested(owner: object, name: object) -> type:
    """For getattr."""
    if owner is not _Optimizer or not isinstance(name, str) or name not in _NESTED:
        raise ValueError(f"getattr of {name!r}")
    return _NESTED[name]


_CLASS = "apex.contrib.optimizers.distributed_fused_adam.DistributedFusedAdam"
STAND_INS: dict[str, Any] = {
    "builtins.getattr": _nested,
    _CLASS: _Optimizer,
    # torch makes instances of what is in here, and of nothing else.
    **{f"{_CLASS}.{name}": nested for name, nested in _NESTED.items()},
}
"""For `load_plain`, by the names that the files use."""


def opened(gathered: object, where: str) -> list[dict[str, Any]]:
    """The ranks' dicts of "gathered_states": one torch file for each, as a tensor of bytes.

    Raises:
        CheckpointError: they are none, or would need code to be read.
    """
    if not isinstance(gathered, list) or not gathered:
        raise CheckpointError(f"{where}: expected gathered_states, a list of one file per rank")
    found = []
    for rank, data in enumerate(gathered):
        if not is_dense(data) or data.dtype != torch.uint8 or data.dim() != 1:
            raise CheckpointError(f"{where}: gathered_states[{rank}]: expected a tensor of bytes")
        file = io.BytesIO(data.numpy().tobytes())
        inner = load_plain(file, f"{where}: gathered_states[{rank}]", stand_ins=STAND_INS)
        if not is_rank(inner):
            raise CheckpointError(f"{where}: gathered_states[{rank}]: expected a rank's state")
        found.append(inner)
    return found


def is_rank(optim: object) -> bool:
    """Whether this is what one rank holds."""
    state = optim.get("state") if isinstance(optim, dict) else None
    return isinstance(state, dict) and isinstance(state.get("buckets"), list)


def put_together(
    ranks: Iterable[tuple[str, Mapping[str, Any]]], path: str
) -> dict[int, dict[str, Tensor]]:
    """The flat parts of every param that has state: "exp_avg", …, "param" or "remainder".

    ``ranks``: each with what errors call it; ``path``: what they call all of them.

    Raises:
        CheckpointError: elements are missing, come twice, or are not where they should be.
    """
    numels: dict[int, int] = {}
    pieces: dict[int, list[_Piece]] = {}
    for where, optim in ranks:
        state = optim["state"]
        for id, entry in state.items():
            if not isinstance(id, int):
                continue
            fragments = entry.get("fragments") if isinstance(entry, dict) else None
            if not isinstance(fragments, list):
                raise CheckpointError(f"{where}: param {id}: expected fragments")
            here = f"{where}: param {id}"
            numel = max((_span(f, "param_range", here)[1] for f in fragments), default=0)
            if numels.setdefault(id, numel) != numel:
                raise CheckpointError(f"{here}: expected {numels[id]} elements, found {numel}")
            found = (_piece(fragment, state["buckets"], here) for fragment in fragments)
            pieces.setdefault(id, []).extend(piece for piece in found if piece is not None)
    return {id: _whole(f"{path}: param {id}", numel, pieces[id]) for id, numel in numels.items()}


def _whole(where: str, numel: int, pieces: list[_Piece]) -> dict[str, Tensor]:
    """The parts of a param, of which every element is there once."""
    pieces = sorted(pieces, key=lambda piece: piece[0])
    position = 0
    for start, parts in [*pieces, (numel, {})]:
        if start != position:
            wrong = f"none of {position} to {start - 1}" if start > position else f"{start} twice"
            raise CheckpointError(
                f"{where}: expected each of its {numel} elements once, as in all ranks' files "
                f"together, found {wrong}"
            )
        position = start + (parts["exp_avg"].numel() if parts else 0)
    kinds = {tuple((name, tensor.dtype) for name, tensor in parts.items()) for _, parts in pieces}
    if len(kinds) > 1:
        raise CheckpointError(f"{where}: expected the same state in the same dtype throughout")
    names = [name for kind in kinds for name, _ in kind]
    return {name: torch.cat([parts[name] for _, parts in pieces]) for name in names}


def _piece(fragment: object, buckets: list[Any], where: str) -> _Piece | None:
    """What a fragment has in its rank's shard, if anything."""
    _span(fragment, "param_range", where)
    if not vars(fragment).get("in_local_shard"):
        return None
    number = vars(fragment).get("bucket_id")
    if type(number) is not int or not 0 <= number < len(buckets):
        raise CheckpointError(f"{where}: expected one of {len(buckets)} buckets, found {number!r}")
    bucket = buckets[number]
    if type(bucket) is not _Bucket:
        raise CheckpointError(f"{where}: bucket {number}: expected a StateBucket")
    start, end = _span(fragment, "shard_param_range", where)
    first, last = _span(fragment, "shard_range", where)
    if last - first != end - start:
        raise CheckpointError(f"{where}: expected {end - start} elements, found {last - first}")
    if start == end:
        return None
    parts = {}
    for name, part in _PARTS.items():
        shard = vars(bucket).get(name)
        if shard is None and part not in ("exp_avg", "exp_avg_sq"):
            continue
        if not is_dense(shard) or shard.dim() != 1 or last > shard.numel():
            raise CheckpointError(f"{where}: expected a 1-D {name} of {last} or more elements")
        if shard.dtype not in _DTYPES[part == "remainder"]:
            kind = "int16" if part == "remainder" else "fp32, fp16 or bf16"
            raise CheckpointError(f"{where}: {name}: expected {kind}, found {shard.dtype}")
        parts[part] = shard[first:last]
    return start, parts


def _span(fragment: object, name: str, where: str) -> tuple[int, int]:
    if type(fragment) is not _Fragment:
        raise CheckpointError(f"{where}: expected a ParameterFragment")
    match vars(fragment).get(name):
        case (int(start), int(end)) if 0 <= start <= end <= 2**48:
            return start, end
    raise CheckpointError(f"{where}: expected {name}, a range")
