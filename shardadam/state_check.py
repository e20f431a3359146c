"""Whether this rank's params and state are still what the last update made them.

[Note: who wrote that]

After an update the bits of this rank's shard are summed block by block, and before the next update
again. Where a sum has changed, somebody wrote there, or the memory is failing. Operations of torch
count: they move a tensor's version. So a changed block is corruption if neither the tensor's
version has moved nor anybody said that state was written (what is loaded or put into
``optimizer.state`` ends in a new record). Not counted by torch are writes through ``param.data``
and raw memory, and those look like corruption.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam import dtensors
from shardadam.block_sums import bits_of, block_sums
from shardadam.buffers import FlatBucket
from shardadam.kernels.state_formats import is_scale
from shardadam.layout import ALIGNMENT

_Views = Mapping[Tensor, Mapping[str, Tensor]]
_VALUES = "values"


@dataclass(slots=True)
class _Record:
    """Of one bucket: the ``sums`` of every tensor, and how often each was ``written``.

    A tensor has as many sums as blocks, a scalar as spans. ``written`` is of a whole tensor, of the
    params by span.
    """

    sums: dict[str, Tensor]
    written: dict[str, tuple[int, ...]]


class StateCheck:
    """Records and verifies, if ``on``; ``rank`` is named in errors."""

    def __init__(self, on: bool, rank: int) -> None:
        self._on, self._rank = on, rank
        self._records: dict[FlatBucket, _Record] = {}

    def record(self, bucket: FlatBucket, views: _Views) -> None:
        """What ``bucket`` holds is right. ``views``: what `ShownState` shows."""
        if self._on:
            self._records[bucket] = _Record(_sums(bucket), _written(bucket, views))

    def note_params(self, bucket: FlatBucket) -> None:
        """The optimizer has counted the writes to the params, and not changed this rank's shard."""
        if bucket in self._records:
            self._records[bucket].written[_VALUES] = _params_written(bucket)

    def verify(self, views: _Views) -> None:
        """Compare all buckets with their records; ``views`` as there.

        Raises:
            RuntimeError: something has changed that nobody wrote; names the rank, the param and
                the tensor of its state.
        """
        for bucket, record in self._records.items():
            now = _sums(bucket)
            changed = [
                name for name, sums in record.sums.items() if not torch.equal(sums, now[name])
            ]
            if not changed:
                continue
            written = _written(bucket, views)
            for name in changed:
                for index in _changed_spans(bucket, name, record.sums[name], now[name]):
                    before, after = record.written[name], written[name]
                    if before[index % len(before)] == after[index % len(after)]:
                        raise self._corrupted(bucket, index, name)
            self._records[bucket] = _Record(now, written)

    def _corrupted(self, bucket: FlatBucket, index: int, name: str) -> RuntimeError:
        what = "the values" if name == _VALUES else repr(name)
        return RuntimeError(
            f"{what} of {bucket.names[index]} on rank {self._rank} changed since the last update, "
            "and no operation of torch wrote there: the memory is failing, or something wrote "
            "through .data or a raw pointer. Nothing has been updated"
        )


def _sums(bucket: FlatBucket) -> dict[str, Tensor]:
    """Of every tensor, params included."""
    if bucket.exchanged:
        values = block_sums(bucket.memory.owned(slice(0, bucket.bucket.shard_numel), 0))
    else:
        values = torch.cat([block_sums(bucket.shard_piece(i)) for i in range(len(bucket.params))])
    # One scale per block; one scalar per span.
    copied = {n: bits_of(t).clone() for n, t in bucket.state.items() if is_scale(n)}
    copied |= {name: bits_of(tensor).clone() for name, tensor in bucket.scalars.items()}
    summed = {n: block_sums(tensor) for n, tensor in bucket.state.items() if not is_scale(n)}
    return {_VALUES: values, **summed, **copied}


def _written(bucket: FlatBucket, views: _Views) -> dict[str, tuple[int, ...]]:
    """How often torch has written to every tensor."""
    tensors = {**bucket.state, **bucket.scalars}
    written: dict[str, tuple[int, ...]] = {n: (t._version,) for n, t in tensors.items()}
    if not bucket.exchanged:
        # DTensors of the state count for themselves.
        for name, (version,) in written.items():
            shown = [
                views[param].get(bucket.shown_name(index, name))
                for index, param in enumerate(bucket.params)
            ]
            written[name] = tuple(
                version + (0 if view is None else _versions(view)) for view in shown
            )
    return {**written, _VALUES: _params_written(bucket)}


def _params_written(bucket: FlatBucket) -> tuple[int, ...]:
    if bucket.exchanged:
        return tuple(param._version for param in bucket.params)
    # Where their owner replaced a local tensor, it is another.
    locals_ = dtensors.locals_of(bucket.params)
    return tuple(
        hash((_versions(param), local.data_ptr()))
        for param, local in zip(bucket.params, locals_, strict=True)
    )


def _versions(tensor: Tensor) -> int:
    """Operations on a DTensor count as writes to it, and not to its local one."""
    return tensor._version + dtensors.local_of(tensor)._version


def _changed_spans(bucket: FlatBucket, name: str, before: Tensor, now: Tensor) -> list[int]:
    """The spans in which ``before`` and ``now`` differ."""
    at = (before != now).nonzero().flatten().tolist()
    if name in bucket.scalars:
        return [int(index) for index in at]
    found = []
    for piece in bucket.pieces:
        first = piece.shard_offset // ALIGNMENT
        if any(first <= block < first - (-piece.numel // ALIGNMENT) for block in at):
            found.append(piece.span)
    return found
