"""Number formats of adam_update.h: 16-bit conversions, and params beside fp32 masters."""

import pytest
import torch
from torch import Tensor

from shardadam.kernels import Coefficients, Run

BF16, FP16 = torch.bfloat16, torch.float16


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
