"""Whether all ranks still have the same params: a digest of them, compared before an update.

[Note: what a replica check finds]

Every rank has a copy of all params, and in each step gets all but its own shard anew from their
owners. So what has changed in a copy, by a failing memory or a write on one rank only, is gone
after the next update, but has been in a forward and a backward pass; in an owner's shard it is
spread to all by that update. A check comes last before the update, when both can still be seen: of
what happened since the update before. What is not gathered at every step (params without gradients,
replicas of DTensors) stays different, and is found whenever it happened. So do nodes with
``replicate_state``, which have state of their own and gather params inside each: a shard, or a
moment, that changes on one node's owner is spread in that node, and no update brings the nodes
together again.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from shardadam.agreement import Range
from shardadam.alarm import named
from shardadam.block_sums import block_sums, crc_of
from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.layout import ALIGNMENT
from shardadam.replicas import Replicas


class ReplicaCheck:
    """Compares the ranks' params before every ``every``-th step; never, where that is None."""

    def __init__(self, every: int | None, communicator: Communicator) -> None:
        self._every = every if communicator.world_size > 1 else None
        self._communicator = communicator
        self._buckets: list[FlatBucket] = []
        self._replicas: list[tuple[FlatBucket, Replicas]] = []

    def add(self, placed: Mapping[FlatBucket, Replicas | None]) -> None:
        """Compare these too."""
        for bucket, replicas in placed.items():
            if bucket.exchanged:
                self._buckets.append(bucket)
            elif replicas is not None and replicas.holders:
                self._replicas.append((bucket, replicas))

    def word(self, step: int) -> int:
        """What every rank must have alike before step number ``step``; 0 if nothing is compared.

        Waits for a GPU.
        """
        if self._every is None or step % self._every:
            return 0
        sums = [block_sums(bucket.memory.flat) for bucket in self._buckets]
        return 1 + (crc_of(torch.cat(sums)) if sums else 0)

    def compare(self, word: Range) -> None:
        """Raise if the ranks' `word` is not the same; compare DTensors. Collective.

        Raises:
            RuntimeError: params differ; names the first one and who has which, on every rank.
        """
        if not word.agreed:
            names, own = [], []
            for bucket in self._buckets:
                names += bucket.names
                own += _crcs(bucket)
            self._raise_first_difference(names, own, [{(): range(self._communicator.world_size)}])
        if word.high:
            for bucket, replicas in self._replicas:
                own = [crc_of(block_sums(bucket.shard_piece(i))) for i in range(len(bucket.names))]
                self._raise_first_difference(bucket.names, own, replicas.holders)

    def _raise_first_difference(
        self,
        names: Sequence[str],
        own: Sequence[int],
        holders: Sequence[Mapping[tuple[int, ...], Sequence[int]]],
    ) -> None:
        """``holders``: of every param, or of all alike: which ranks have the same elements."""
        held = self._communicator.exchange(own)
        for index, name in enumerate(names):
            for ranks in holders[index % len(holders)].values():
                found: dict[int, list[int]] = defaultdict(list)
                for rank in ranks:
                    found[held[rank][index]].append(rank)
                if len(found) > 1:
                    raise _difference(name, found)


def _crcs(bucket: FlatBucket) -> list[int]:
    """Of every param, with the padding behind it."""
    sums, spans = block_sums(bucket.memory.flat), bucket.bucket.spans
    starts = [span.offset // ALIGNMENT for span in spans]
    stops = [*starts[1:], len(sums)]
    return [crc_of(sums[start:stop]) for start, stop in zip(starts, stops, strict=True)]


def _difference(name: str, found: Mapping[int, Sequence[int]]) -> RuntimeError:
    """``found``: which ranks have which digest."""
    most, *others = sorted(found.items(), key=lambda item: -len(item[1]))
    digests = ", ".join(f"{named(ranks)} {crc:08x}" for crc, ranks in [most, *others])
    outvoted = sorted(rank for _, ranks in others for rank in ranks)
    culprits = f"; most ranks agree, {named(outvoted)} changed"
    return RuntimeError(
        f"ranks no longer have the same params: {name} has the digest {digests}"
        f"{culprits if len(most[1]) > len(outvoted) else ''}. A memory or a link fails, or the "
        "param was written on some ranks only. Nothing has been updated"
    )
