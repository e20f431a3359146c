"""The layout, in one process, over many world sizes and awkward shapes."""

import time

from hypothesis import given
from hypothesis import strategies as st

from shardadam.layout import ALIGNMENT, Bucket, Entry, plan_buckets

NUMELS = st.lists(
    st.one_of(st.integers(0, 3), st.integers(100, 300), st.integers(0, 20_000)), max_size=30
)


def entries(numels: list[int], groups: int = 1) -> list[Entry]:
    return [
        Entry(index, index * groups // len(numels), numel) for index, numel in enumerate(numels)
    ]


@given(NUMELS, st.integers(1, 64), st.integers(1, 50_000), st.integers(1, 4))
def test_every_element_is_owned_exactly_once(numels, world_size, bucket_numel, groups):
    buckets = plan_buckets(entries(numels, groups), bucket_numel, world_size)
    owned = {index: [] for index in range(len(numels))}
    for bucket in buckets:
        for rank in range(world_size):
            for piece in bucket.pieces(rank):
                span = bucket.spans[piece.span]
                if piece.numel:
                    owned[span.param].append((piece.param_offset, piece.numel))
                    # The piece lies in the shard where the span lies in the bucket.
                    start = rank * bucket.shard_numel + piece.shard_offset
                    assert start == span.offset + piece.param_offset
                    assert piece.shard_offset + piece.numel <= bucket.shard_numel
    for index, numel in enumerate(numels):
        position = 0
        for offset, count in sorted(owned[index]):
            assert offset == position
            # Cut between blocks of the param's own coordinates, or at its end.
            position += count
            assert position % ALIGNMENT == 0 or position == numel
        assert position == numel


@given(NUMELS, st.integers(1, 64), st.integers(1, 50_000), st.integers(1, 4))
def test_spans_and_shards_are_aligned_packed_and_balanced(numels, world_size, bucket_numel, groups):
    buckets = plan_buckets(entries(numels, groups), bucket_numel, world_size)
    seen = []
    for bucket in buckets:
        assert bucket.shard_numel % ALIGNMENT == 0
        end = 0
        for span in bucket.spans:
            assert span.offset % ALIGNMENT == 0 and span.offset >= end
            end = span.offset + span.numel
        assert end <= bucket.numel
        assert bucket.padding < ALIGNMENT * (world_size + len(bucket.spans))
        assert [span.group for span in bucket.spans] == sorted(span.group for span in bucket.spans)
        filled = sum(-(-span.numel // ALIGNMENT) * ALIGNMENT for span in bucket.spans)
        assert filled <= bucket_numel or len(bucket.spans) == 1 or filled == 0
        seen.append(sorted((span.param for span in bucket.spans), reverse=True))
    # Last registered first.
    assert [param for bucket in seen for param in bucket] == list(range(len(numels)))[::-1]


def test_empty_shards():
    (bucket,) = plan_buckets(entries([5]), 1 << 20, 64)
    numels = [sum(piece.numel for piece in bucket.pieces(rank)) for rank in range(64)]
    assert numels == [5] + [0] * 63


def test_more_than_2_to_the_31_elements():
    huge = 3 * 2**32 + 1
    buckets = plan_buckets(entries([7, huge, 7]), 1 << 23, 8)
    bucket = next(bucket for bucket in buckets if bucket.spans[0].numel == huge)
    assert sum(piece.numel for rank in range(8) for piece in bucket.pieces(rank)) == huge
    (last,) = bucket.pieces(7)
    assert last.param_offset > 2**33 and last.param_offset + last.numel == huge


def test_a_hundred_thousand_tiny_params():
    start = time.process_time()
    buckets = plan_buckets(entries([1] * 100_000), 1 << 23, 8)
    count = sum(
        1 for bucket in buckets for rank in range(8) for piece in bucket.pieces(rank) if piece.numel
    )
    assert count == 100_000
    assert time.process_time() - start < 10  # quadratic would be minutes


def test_the_picture_in_the_module():
    (bucket,) = plan_buckets([Entry(2, 1, 130), Entry(1, 0, 100), Entry(0, 0, 200)], 1 << 20, 2)
    assert isinstance(bucket, Bucket)
    assert [span.offset for span in bucket.spans] == [0, 256, 384]
    assert bucket.shard_numel == 384
    assert [piece.numel for piece in bucket.pieces(0)] == [200, 100, 0]
    assert [piece.numel for piece in bucket.pieces(1)] == [0, 0, 130]
