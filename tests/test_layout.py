"""The layout, in one process, over many world sizes and awkward shapes."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from shardadam.kernels import exact_sum
from shardadam.layout import ALIGNMENT, Bucket, Entry, plan_buckets

NUMEL = st.one_of(st.integers(0, 3), st.integers(100, 300), st.integers(0, 20_000))
# A param and its group; groups come in any order, as params that are added late do.
PARAMS = st.lists(st.tuples(NUMEL, st.integers(0, 3)), max_size=30)
WORLD_SIZE, BUCKET_NUMEL = st.integers(1, 64), st.integers(1, 50_000)


def entries(params: list[tuple[int, int]]) -> list[Entry]:
    return [Entry(index, group, numel) for index, (numel, group) in enumerate(params)]


def padded(entry: Entry) -> int:
    return -(-entry.numel // ALIGNMENT) * ALIGNMENT


@settings(max_examples=400)
@given(PARAMS, WORLD_SIZE, BUCKET_NUMEL)
def test_every_element_is_owned_exactly_once(params, world_size, bucket_numel):
    buckets = plan_buckets(entries(params), bucket_numel, world_size)
    owned = {index: [] for index in range(len(params))}
    for bucket in buckets:
        for rank in range(world_size):
            for piece in bucket.pieces(rank):
                span = bucket.spans[piece.span]
                # An empty piece too is a valid slice of the shard.
                assert 0 <= piece.shard_offset <= bucket.shard_numel - piece.numel
                if piece.numel:
                    owned[span.param].append((piece.param_offset, piece.numel))
                    # The piece lies in the shard where the span lies in the bucket.
                    start = rank * bucket.shard_numel + piece.shard_offset
                    assert start == span.offset + piece.param_offset
    for index, (numel, _) in enumerate(params):
        position = 0
        for offset, count in sorted(owned[index]):
            assert offset == position
            # Cut between blocks of the param's own coordinates, or at its end.
            position += count
            assert position % ALIGNMENT == 0 or position == numel
        assert position == numel


@settings(max_examples=400)
@given(PARAMS, WORLD_SIZE, BUCKET_NUMEL)
def test_spans_and_shards_are_aligned_packed_and_balanced(params, world_size, bucket_numel):
    waiting = entries(params)
    buckets = plan_buckets(waiting, bucket_numel, world_size)
    for bucket in buckets:
        assert bucket.shards == world_size
        assert bucket.shard_numel % ALIGNMENT == 0
        end = 0
        for span in bucket.spans:
            assert span.offset % ALIGNMENT == 0 and span.offset >= end
            end = span.offset + span.numel
        assert end <= bucket.numel
        assert bucket.padding < ALIGNMENT * (world_size + len(bucket.spans))
        # Last registered first: from bucket to bucket, and in each group inside one.
        waiting, taken = waiting[: -len(bucket.spans)], waiting[-len(bucket.spans) :]
        taken.sort(key=lambda entry: (entry.group, -entry.param))
        assert [Entry(span.param, span.group, span.numel) for span in bucket.spans] == taken
        # Full, and no fuller: what comes next would not have fitted.
        filled = sum(map(padded, taken))
        assert filled <= bucket_numel or len(taken) == 1
        assert not waiting or filled + padded(waiting[-1]) > bucket_numel
    assert not waiting


@settings(max_examples=400)
@given(PARAMS, WORLD_SIZE, BUCKET_NUMEL)
def test_where_params_lie_does_not_depend_on_the_world_size(params, world_size, bucket_numel):
    planned = plan_buckets(entries(params), bucket_numel, world_size)
    alone = plan_buckets(entries(params), bucket_numel, 1)
    assert [bucket.spans for bucket in planned] == [bucket.spans for bucket in alone]


def test_empty_shards():
    (bucket,) = plan_buckets(entries([(5, 0)]), 1 << 20, 64)
    numels = [sum(piece.numel for piece in bucket.pieces(rank)) for rank in range(64)]
    assert numels == [5] + [0] * 63


def test_more_than_2_to_the_31_elements():
    huge = 3 * 2**32 + 1
    buckets = plan_buckets(entries([(7, 0), (huge, 0), (7, 0)]), 1 << 23, 8)
    bucket = next(bucket for bucket in buckets if bucket.spans[0].numel == huge)
    assert sum(piece.numel for rank in range(8) for piece in bucket.pieces(rank)) == huge
    (last,) = bucket.pieces(7)
    assert last.param_offset > 2**33 and last.param_offset + last.numel == huge


def test_a_hundred_thousand_tiny_params():
    tiny = entries([(1, 0)] * 100_000)
    start = time.process_time()
    buckets = plan_buckets(tiny, 1 << 23, 8)
    pieces = [piece for bucket in buckets for piece in bucket.pieces(3)]
    assert time.process_time() - start < 2.0  # what one rank does; quadratic would be minutes
    # Two buckets, of 65,536 params and the rest, of each of which a rank owns an eighth.
    assert len(pieces) == 100_000
    assert sum(piece.numel for piece in pieces) == 65_536 // 8 + 34_464 // 8


def test_the_picture_in_the_module():
    (bucket,) = plan_buckets([Entry(2, 1, 130), Entry(1, 0, 100), Entry(0, 0, 200)], 1 << 20, 2)
    assert isinstance(bucket, Bucket)
    assert [span.offset for span in bucket.spans] == [0, 256, 384]
    assert bucket.shard_numel == 384
    assert [piece.numel for piece in bucket.pieces(0)] == [200, 100, 0]
    assert [piece.numel for piece in bucket.pieces(1)] == [0, 0, 130]


def test_blocks_of_the_norm_are_cut_nowhere():
    assert ALIGNMENT % exact_sum.BLOCK == 0
