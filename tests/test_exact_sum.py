"""The exact sum of squares: no order, cut or kernel changes a bit of it."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardadam.kernels import backend_for, exact_sum, reference

# Squares, so no negative ones; hypothesis is fond of subnormal, huge and special values.
DOUBLES = st.lists(st.floats(min_value=0.0, allow_nan=False, allow_infinity=False), max_size=40)
ANY_DOUBLES = st.lists(st.floats(min_value=0.0) | st.just(math.nan), max_size=10)


def words_of(values: list[float]) -> torch.Tensor:
    words = exact_sum.zero()
    exact_sum.add(words, torch.tensor(values, dtype=torch.float64))
    return words


def exact_of(words: torch.Tensor) -> Fraction:
    limbs = words[: exact_sum.LIMBS].tolist()
    return Fraction(sum(limb << (32 * index) for index, limb in enumerate(limbs)), 1 << 1074)


@settings(max_examples=400)
@given(DOUBLES, st.randoms(), st.integers(1, 8))
def test_sums_are_exact_in_any_order_and_cut(values, random, ranks):
    exact = sum(map(Fraction, values), Fraction(0))
    shuffled = random.sample(values, len(values))
    # Each rank adds its own, an all-reduce adds up the words.
    words = sum((words_of(shuffled[rank::ranks]) for rank in range(ranks)), exact_sum.zero())
    assert exact_of(words) == exact
    try:
        expected = math.sqrt(math.fsum(values))  # fsum rounds once too
    except OverflowError:
        expected = math.inf
    assert exact_sum.root(words) == expected


@given(ANY_DOUBLES, st.randoms())
def test_infinities_and_nans(values, random):
    words = words_of(values)
    assert torch.equal(words, words_of(random.sample(values, len(values))))
    root = exact_sum.root(words)
    if any(map(math.isnan, values)):
        assert math.isnan(root)
    elif math.inf in values:
        assert root == math.inf
    else:
        assert exact_of(words) == sum(map(Fraction, values), Fraction(0))


@given(st.floats(min_value=0.0, allow_infinity=False))
def test_no_limb_overflows_within_2_to_the_31_terms(value):
    limbs = words_of([value])
    assert 0 <= limbs.min() and limbs.max() < 2**32


@pytest.mark.parametrize("significand", [0, 1, 2**52 - 1, 2**32 - 1, 2**52 - 2**32])
def test_every_exponent(significand):
    bits = torch.arange(2047, dtype=torch.int64) << 52 | significand
    values = bits.view(torch.float64)
    for value in values.tolist():
        words = words_of([value])
        assert exact_of(words) == Fraction(value)
        assert words.max() < 2**32
    assert exact_of(words_of(values.tolist())) == sum(map(Fraction, values.tolist()))


def test_the_largest_sum_fits():
    # 2^31 times the largest double.
    words = words_of([torch.finfo(torch.float64).max]) * 2**31
    assert exact_of(words) == Fraction(torch.finfo(torch.float64).max) * 2**31
    assert exact_sum.root(words) == math.inf


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_twin_equals_reference(dtype, twin):
    generator = torch.Generator().manual_seed(0)
    for numel in [*range(301), 5_000, 300_000]:
        start = numel % 5  # also where no vector is aligned
        values = torch.randn(start + numel, generator=generator, dtype=torch.float64)
        # float16 overflows at one end and is subnormal at the other.
        values *= 10.0 ** torch.randint(-7, 6, (start + numel,), generator=generator)
        values = values.to(dtype)[start:]
        if numel % 7 == 3:
            values[numel // 2] = math.inf if numel % 2 else math.nan
        expected, found, threaded = (exact_sum.zero() for _ in range(3))
        reference.sum_squares(values, expected)
        twin.sum_squares([values], found)
        torch.set_num_threads(2)
        twin.sum_squares([values], threaded)
        torch.set_num_threads(1)
        assert torch.equal(found, expected)
        assert torch.equal(threaded, expected)


def test_threads_do_not_lose_each_others_terms(twin):
    # All into the same few words, so often that threads which shared them would collide.
    values = torch.full((2_000_003,), 1.7)
    expected = exact_sum.zero()
    twin.sum_squares([values], expected)
    torch.set_num_threads(2)
    for _ in range(50):
        words = exact_sum.zero()
        twin.sum_squares([values], words)
        assert torch.equal(words, expected)
    torch.set_num_threads(1)


def test_norm_of_a_large_tensor():
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    words = exact_sum.zero()
    backend_for(torch.device("cpu")).sum_squares([values], words)
    expected = math.sqrt(math.fsum(value * value for value in values.double().tolist()))
    # Seven roundings of 2^-53 in a block's sum and one of the total, halved by the root; the root's
    # own; and the same two of what is expected, without the blocks.
    assert exact_sum.root(words) == pytest.approx(expected, rel=(4 + 1 + 1.5) * 2**-53)
