"""The whole state on one rank: from every rank's shards to full tensors, bucket by bucket."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardadam import dtensors
from shardadam.agreement import Point, digest, first_difference, meet
from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.kernels.state_formats import decode, is_scale, part_of
from shardadam.params import describe, view_like
from shardadam.shown_state import is_ours
from shardadam.state_dict import ids_of


@dataclass(slots=True)
class Whole:
    """What was consolidated, while it is the state: for `ShardTensor` to be saved as.

    ``versions``: of the buckets' tensors, which are written to by hand too.
    """

    state: dict[Any, Any] | None
    buckets: Sequence[FlatBucket]
    versions: list[int]

    @classmethod
    def of(cls, state: dict[Any, Any], buckets: Sequence[FlatBucket]) -> "Whole":
        """``state`` is that of ``buckets`` now."""
        return cls(state, buckets, _versions(buckets))

    def tensor(self, id: Any, name: str) -> Tensor | None:
        """The full tensor ``name`` of param ``id``; None when it has changed."""
        if self.state is None or self.versions != _versions(self.buckets):
            return None
        found: Tensor | None = self.state.get(id, {}).get(name)
        return found


def _versions(buckets: Sequence[FlatBucket]) -> list[int]:
    return [
        tensor._version
        for bucket in buckets
        for tensor in (*bucket.state.values(), *bucket.scalars.values())
    ]


def consolidate(
    packed: dict[str, Any],
    param_groups: list[dict[str, Any]],
    buckets: Sequence[FlatBucket],
    communicator: Communicator,
    to: int,
    broken: str | None,
) -> dict[str, Any] | None:
    """``packed`` with full tensors on rank ``to``, None on the others. Collective.

    Args:
        packed: this rank's `state_dict()`; its entries are replaced, not changed.
        param_groups: the optimizer's.
        buckets: all of them, in the same order on every rank.
        communicator: the ranks.
        to: the receiver, in the process group.
        broken: what broke an earlier step off, if anything did.

    The tensors of one bucket share their storage. Coded moments are there twice: as they are, which
    a coded optimizer reads, and as what they stand for, which any other does.

    Raises:
        ValueError: ``to`` is not a rank, differs between ranks, or is not on a DTensor's mesh.
        RuntimeError: the state is not whole; another rank failed.
    """
    error: Exception | None = None
    if broken is not None:
        error = RuntimeError(
            f"an earlier step() was broken off by {broken}: the shards of the state may not belong "
            "together, so there is nothing to consolidate"
        )
    elif not isinstance(to, int) or not 0 <= to < communicator.world_size:
        error = ValueError(
            f"Invalid to: {to!r}, expected a rank from 0 to {communicator.world_size - 1}"
        )
    elif communicator.rank == to:
        error = _out_of_reach(buckets)
    names = [name for bucket in buckets for name in bucket.state]
    words = {"to": 0 if error else int(to), "names": digest("\n".join(names))}
    seen = meet(communicator, Point.CONSOLIDATION, words, error)
    if not (seen["to"].agreed and seen["names"].agreed):
        difference = first_difference(communicator.exchange([f"to={to!r}", *names]))
        raise ValueError(f"ranks differ in what they consolidate: {difference}")

    ids = ids_of(param_groups)
    state = dict(packed["state"])
    for bucket in buckets:
        if not bucket.exchanged:
            _consolidate_dtensors(bucket, ids, state, here=communicator.rank == to)
            continue
        flats = communicator.gather(list(bucket.state.values()), to)
        if communicator.rank != to:
            continue
        for index, param in enumerate(bucket.params):
            if param not in ids:
                continue  # its group has been removed
            state[ids[param]] = {
                **state.get(ids[param], {}),
                **{name: values[index].cpu().clone() for name, values in bucket.scalars.items()},
                **_shaped(bucket, index, dict(zip(bucket.state, flats, strict=True))),
            }
    return {**packed, "state": state} if communicator.rank == to else None


def _out_of_reach(buckets: Sequence[FlatBucket]) -> ValueError | None:
    """What is wrong with this rank as the receiver: only ranks of its mesh gather a DTensor."""
    for bucket in buckets:
        for name, param in zip(bucket.names, bucket.params, strict=True):
            if dtensors.is_dtensor(param) and not dtensors.shard_of(param):
                return ValueError(f"to: expected a rank on the mesh of {name}, {describe(param)}")
    return None


def _consolidate_dtensors(
    bucket: FlatBucket, ids: Mapping[Tensor, int], state: dict[int, Any], *, here: bool
) -> None:
    """Put full tensors in the place of DTensors. Collective over their meshes, one at a time."""
    for index, param in enumerate(bucket.params):
        if param not in ids:
            continue  # its group has been removed
        parts = bucket.owned_state(index)
        if bucket.form.has_scales:
            coded = set(bucket.form.tensors(True).values())
            moments = decode(bucket.form, parts)
            parts = {**moments, **{n: part for n, part in parts.items() if n not in coded}}
        entry = {}
        for name, part in parts.items():
            shown = bucket.memory.shown(index, view_like(bucket.views[index], part))
            full = dtensors.full(shown)
            if here:
                entry[name] = full.cpu()
        if here:
            scalars = {name: values[index].cpu().clone() for name, values in bucket.scalars.items()}
            kept = {k: v for k, v in state.get(ids[param], {}).items() if not is_ours(k)}
            state[ids[param]] = {**kept, **scalars, **entry}


def _shaped(bucket: FlatBucket, index: int, flats: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of span ``index`` of all ranks; coded moments also as float32 ones."""
    span, param = bucket.bucket.spans[index], bucket.params[index]
    start, stop = span.offset, span.offset + span.numel
    parts = {name: flat[part_of(name, start, stop)] for name, flat in flats.items()}
    decoded = decode(bucket.form, parts) if bucket.form.has_scales else {}
    return {
        **{name: view_like(param, values) for name, values in decoded.items()},
        **{
            bucket.shown_name(index, name): part if is_scale(name) else view_like(param, part)
            for name, part in parts.items()
        },
    }
