"""Which element of which param lives where: pure integers, no tensors.

[Note: the layout]

Params are packed, last registered first (the order in which backward finishes their grads), into
buckets; inside a bucket they lie in order of their param group. Every param's *span* starts at a
multiple of ALIGNMENT elements, and the bucket is padded so that each rank's *shard* is equally
long and aligned too. Two ranks, params a (200 elements) and b (100) of group 0, c (130) of group 1:

    bucket   |0        128       256       384       512       640       768|
    spans    | a a a a a a a . . | b b b b . | c c c c c c . . . | . . . . .|      . = padding
    shards   |         rank 0 [0, 384)       |        rank 1 [384, 768)     |
    pieces   | a[0:200]            b[0:100]  | c[0:130]                     |

A *piece* is what one rank owns of one param. Because spans and shards are cut at multiples of
ALIGNMENT, a block of ALIGNMENT elements counted from a param's first element never straddles two
params or two ranks: whatever is computed per block does not depend on the world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 128
"""Elements; 512 bytes of fp32, a multiple of every vector width, cache line and warp."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One param to be laid out: its index, its param group, its number of elements."""

    param: int
    group: int
    numel: int


@dataclass(frozen=True, slots=True)
class Span:
    """One param's range in a bucket: elements ``[offset, offset + numel)``."""

    param: int
    group: int
    offset: int
    numel: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One param's range in one rank's shard of a bucket; ``span`` indexes ``Bucket.spans``."""

    span: int
    param_offset: int
    shard_offset: int
    numel: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """A flat range of elements, cut into ``shards`` of ``shard_numel`` each."""

    spans: tuple[Span, ...]
    shard_numel: int
    shards: int

    @property
    def numel(self) -> int:
        """Elements with padding."""
        return self.shard_numel * self.shards

    @property
    def padding(self) -> int:
        """Elements that belong to no param."""
        return self.numel - sum(span.numel for span in self.spans)

    def pieces(self, shard: int) -> tuple[Piece, ...]:
        """What is in one shard, one piece per span in the spans' order; empty pieces included."""
        start, stop = shard * self.shard_numel, (shard + 1) * self.shard_numel
        pieces = []
        for index, span in enumerate(self.spans):
            first = min(max(start, span.offset), span.offset + span.numel)
            last = max(min(stop, span.offset + span.numel), first)
            shard_offset = first - start if last > first else 0
            pieces.append(Piece(index, first - span.offset, shard_offset, last - first))
        return tuple(pieces)


def plan_buckets(
    entries: Sequence[Entry], bucket_numel: int, shards: int, parts: int = 1
) -> tuple[Bucket, ...]:
    """Pack ``entries`` (in registration order) into buckets.

    A bucket is closed before it would exceed ``bucket_numel`` elements; a param larger than that
    has a bucket of its own. Each of ``shards`` can be cut into ``parts``, equal and aligned too.
    See [Note: the layout].
    """
    buckets = []
    open_entries: list[Entry] = []
    open_numel = 0
    for entry in reversed(entries):
        numel = _round_up(entry.numel)
        if open_entries and open_numel + numel > bucket_numel:
            buckets.append(_close(open_entries, shards, parts))
            open_entries, open_numel = [], 0
        open_entries.append(entry)
        open_numel += numel
    if open_entries:
        buckets.append(_close(open_entries, shards, parts))
    return tuple(buckets)


def _close(entries: Sequence[Entry], shards: int, parts: int) -> Bucket:
    spans = []
    offset = 0
    for entry in sorted(entries, key=lambda entry: entry.group):
        spans.append(Span(entry.param, entry.group, offset, entry.numel))
        offset += _round_up(entry.numel)
    return Bucket(tuple(spans), parts * _round_up(-(-offset // (shards * parts))), shards)


def _round_up(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT
