"""The exact sum of squares: no order, cut or kernel changes a bit of it."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardadam.kernels import backend_for, exact_sum, reference

DOUBLES = st.lists(st.floats(min_value=0.0, allow_nan=False, allow_infinity=False), max_size=40)


def words_of(values: list[float]) -> torch.Tensor:
    words = exact_sum.zero()
    exact_sum.add(words, torch.tensor(values, dtype=torch.float64))
    return words


@given(DOUBLES, st.randoms())
def test_sums_are_exact_in_any_order_and_cut(values, random):
    exact = sum(map(Fraction, values), Fraction(0))
    shuffled = random.sample(values, len(values))
    cut = random.randint(0, len(values))
    words = words_of(shuffled[:cut]) + words_of(shuffled[cut:])
    total = sum(int(limb) << (32 * index) for index, limb in enumerate(words[: exact_sum.LIMBS]))
    assert Fraction(total, 1 << 1074) == exact
    try:
        expected = math.sqrt(exact.numerator / exact.denominator)
    except OverflowError:
        expected = math.inf
    assert exact_sum.root(words) == expected


def test_infinities_and_nans():
    assert exact_sum.root(words_of([1.0, math.inf])) == math.inf
    assert math.isnan(exact_sum.root(words_of([math.inf, math.nan])))
    assert exact_sum.root(words_of([])) == 0.0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_twin_equals_reference(dtype, twin):
    generator = torch.Generator().manual_seed(0)
    for numel in [*range(301), 5_000, 300_000]:
        values = torch.randn(numel, generator=generator, dtype=torch.float64)
        values *= 10.0 ** torch.randint(-4, 4, (numel,), generator=generator)
        values = values.to(dtype)
        if numel % 7 == 3:
            values[numel // 2] = math.inf if numel % 2 else math.nan
        expected, found = exact_sum.zero(), exact_sum.zero()
        reference.sum_squares(values, expected)
        torch.set_num_threads(2 if numel >= 300_000 else 1)
        twin.sum_squares(values, found)
        torch.set_num_threads(1)
        assert exact_sum.root(expected) == exact_sum.root(found) or values.isnan().any()
        assert torch.equal(expected, found)


def test_norm_of_a_large_tensor():
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    words = exact_sum.zero()
    backend_for("cpu").sum_squares(values, words)
    expected = math.sqrt(math.fsum(value * value for value in values.double().tolist()))
    # Seven roundings of 2^-53 in a block's sum, halved by the root.
    assert exact_sum.root(words) == pytest.approx(expected, rel=4 * 2**-53)
