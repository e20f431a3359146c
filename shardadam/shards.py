"""What this rank holds of every param's state, for whoever writes it down or reads it back."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from shardadam.buffers import FlatBucket


@dataclass(frozen=True, slots=True)
class ParamShard:
    """One param's elements on this rank.

    ``tensors`` are 1-D views of ``numel`` elements ("exp_avg", "exp_avg_sq", where used
    "max_exp_avg_sq", "master" or "remainder"), and ``values`` of the param itself: numbers
    ``offset``, ``offset + 1``, … of the param's elements in the order of its memory, a complex
    number being two. ``dims`` are the param's dims from the outermost in memory to the innermost.
    ``scalars`` ("step", NAdam's "mu_product") are 0-dim views, which every rank has.
    """

    name: str
    param: Tensor
    offset: int
    numel: int
    dims: tuple[int, ...]
    values: Tensor
    tensors: dict[str, Tensor]
    scalars: dict[str, Tensor]


def shards_of(places: Mapping[Tensor, tuple[FlatBucket, int]]) -> list[ParamShard]:
    """The shards of all ``places`` of an optimizer, in their order; ``numel`` may be 0."""
    return [shard_of(bucket, index) for bucket, index in places.values()]


def shard_of(bucket: FlatBucket, index: int) -> ParamShard:
    """The shard of the param of span ``index``."""
    piece = bucket.pieces[index]
    strides = bucket.views[index].stride()
    part = slice(piece.shard_offset, piece.shard_offset + piece.numel)
    return ParamShard(
        name=bucket.names[index],
        param=bucket.params[index],
        offset=piece.param_offset,
        numel=piece.numel,
        dims=tuple(sorted(range(len(strides)), key=strides.__getitem__, reverse=True)),
        values=bucket.shard[part],
        tensors={name: tensor[part] for name, tensor in bucket.state.items()},
        scalars={name: values[index] for name, values in bucket.scalars.items()},
    )
