"""What this rank holds of every param's state, for whoever writes it down or reads it back."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.kernels.state_formats import MASTER_BITS, StateFormat


@dataclass(frozen=True, slots=True)
class ParamShard:
    """One param's elements on this rank.

    ``tensors`` are 1-D views of ``numel`` elements, or of one per block (the moments' by the names
    of [Note: state formats], in ``form``, and one of `MASTERS`), and ``values`` of the param
    itself: numbers ``offset``, ``offset + 1``, … of the param's elements in the order of its
    memory, a complex number being two. ``dims`` are the param's dims from the outermost in memory
    to the innermost. ``scalars`` ("step", NAdam's "mu_product") are 0-dim views, which every rank
    has.
    """

    name: str
    param: Tensor
    offset: int
    numel: int
    dims: tuple[int, ...]
    form: StateFormat
    values: Tensor
    tensors: dict[str, Tensor]
    scalars: dict[str, Tensor]

    @property
    def master_bits(self) -> int:
        """Of a master weight."""
        own = self.values.itemsize * 8
        return max([own, *(bits for name, bits in MASTER_BITS.items() if name in self.tensors)])


def shards_of(places: Mapping[Tensor, tuple[FlatBucket, int]]) -> list[ParamShard]:
    """The shards of all ``places`` of an optimizer, in their order; ``numel`` may be 0."""
    return [shard_of(bucket, index) for bucket, index in places.values()]


def shard_of(bucket: FlatBucket, index: int) -> ParamShard:
    """The shard of the param of span ``index``."""
    piece = bucket.pieces[index]
    strides = bucket.views[index].stride()
    return ParamShard(
        name=bucket.names[index],
        param=bucket.params[index],
        offset=piece.param_offset,
        numel=piece.numel,
        dims=tuple(sorted(range(len(strides)), key=strides.__getitem__, reverse=True)),
        form=bucket.form,
        values=bucket.shard_piece(index),
        tensors=bucket.owned_state(index),
        scalars={name: values[index] for name, values in bucket.scalars.items()},
    )
