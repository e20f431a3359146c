"""Number formats of adam_update.h: all patterns of the split master, and 16-bit conversions."""

import pytest
import torch
from torch import Tensor

from conftest import BEST_ISA
from shardadam.kernels import Coefficients, Run, reference

BF16, FP16 = torch.bfloat16, torch.float16


def test_all_patterns_of_the_split_master(twin):
    # All 2^32 with the instruction set that runs here, every 16th block with the others.
    chunk = 1 << 26
    stride = 1 if twin.isa == BEST_ISA else 16
    for index in range(0, 64, stride):
        first = index * chunk - (1 << 31)
        bits = torch.arange(first, first + chunk, dtype=torch.int32)
        master = bits.view(torch.float32)
        param, remainder = twin.split(master)
        joined = twin.join(param, remainder)
        # In order of their bits, NaNs are the ends of the two halves.
        same = joined.view(torch.int32) == bits
        if not same.all():
            assert master[~same].isnan().all()
            assert joined[~same].isnan().all()
        if (bits[-1] & 0x7FFFFFFF) > 0x7F800000:
            nan = master.isnan()
            assert torch.equal(param.isnan(), nan) and torch.equal(joined.isnan(), nan)
        if index % 16 == 0:
            expected = reference.split_master(master)
            assert torch.equal(param.view(torch.int16), expected[0].view(torch.int16))
            assert torch.equal(remainder, expected[1])
            again = reference.join_master(param, remainder)
            assert torch.equal(again.view(torch.int32), joined.view(torch.int32))


@pytest.mark.parametrize(
    ("bits", "param"),
    [
        (0x3F808000, 0x3F81),  # a tie, away from zero: to even would need one code more
        (0x3F818000, 0x3F82),
        (0x3F807FFF, 0x3F80),
        (0x7F7FFFFF, 0x7F80),  # the largest float: the param is infinite, the master is not
        (0x7F800000, 0x7F80),
        (0x7FFFFFFF, 0x7FFF),  # a NaN that would wrap around to -0
        (0x7F800001, 0x7FC0),  # a NaN that would become infinite
        (0xFFFFFFFF, 0xFFFF),
    ],
)
def test_traps_of_the_split_master(bits, param, twin):
    signed = bits - (1 << 32) if bits >> 31 else bits
    master = torch.tensor([signed], dtype=torch.int32).view(torch.float32)
    for split, join in (
        (twin.split, twin.join),
        (reference.split_master, reference.join_master),
    ):
        high, low = split(master)
        assert high.view(torch.int16).item() & 0xFFFF == param
        joined = join(high, low)
        if master.isnan():
            assert joined.isnan() and high.isnan()
        else:
            assert joined.view(torch.int32).item() == signed


def run_once(twin, param: Tensor, master: Tensor | None, grad: Tensor) -> Run:
    """One update that leaves the param's value alone and makes exp_avg the gradient."""
    keep = Coefficients(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0)
    zeros = [torch.zeros(len(param)) for _ in range(2)]
    run = Run(param, *zeros, None, master, grad, keep)
    twin.update([run])
    return run


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_16_bit_gradient_is_read_as_torch_reads_it(dtype, twin):
    grad = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    run = run_once(twin, torch.zeros(len(grad)), None, grad)
    finite = grad.isfinite()
    # 1 * g + 0 * 0, whose zero has no sign.
    assert torch.equal(run.exp_avg[finite], grad[finite].float())
    assert torch.equal(run.exp_avg.isnan(), grad.isnan())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_masters_are_rounded_as_torch_rounds(dtype, twin):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1_000_000,), generator=generator)
    random = bits.to(torch.int32).view(torch.float32)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = every.float()[every.isfinite()]
    # Ties lie half way between neighbours, and a bit beside.
    ties = (exact[:-1].double() + exact[1:].double()).div(2).float()
    infinity = torch.tensor(float("inf"))
    masters = torch.cat(
        [random, exact, ties, ties.nextafter(infinity), ties.nextafter(-infinity), exact / 3]
    )
    masters = masters[masters.isfinite()]
    param = masters.to(dtype)
    run = run_once(twin, param.clone(), masters.clone(), torch.zeros_like(masters))
    assert torch.equal(run.master, masters)
    number = ~param.isnan()
    assert torch.equal(run.param.view(torch.int16)[number], param.view(torch.int16)[number])


def test_a_written_param_wins_over_its_master(twin):
    param = torch.tensor([1.0, 2.0, -3.0], dtype=FP16)
    master = torch.tensor([1.0001, 7.0, -3.0])
    run = run_once(twin, param, master, torch.zeros(3))
    assert run.master.tolist() == [pytest.approx(1.0001), 2.0, -3.0]
    assert run.param.tolist() == [1.0, 2.0, -3.0]
