"""Masters of 24 bits, and none: what is kept is one of the two neighbours, right on average."""

import pytest
import torch
from torch import Tensor

from conftest import BEST_ISA
from shardadam.kernels import Coefficients, Run, reference
from shardadam.kernels.random_bits import PARAM, random_bits

INT32_MIN = -(1 << 31)
SIZE = 1 << 18  # elements at a time: they stay in the cache
# Adam's rule made an assignment: the new master weight is the gradient.
ASSIGN = Coefficients(0.0, 0.0, 1.0, 0.0, 0.0, -1.0, 1.0, 1.0, 0.0, 1.0, step=5.0)


def assigning_run(master: Tensor | None, grad: Tensor) -> Run:
    numel = len(grad)
    param = torch.zeros(numel, dtype=torch.bfloat16)
    return Run(param, torch.zeros(numel), torch.zeros(numel), None, master, grad, ASSIGN, seed=3)


@pytest.mark.parametrize("width", [8, 16])
def test_all_patterns(width, twin):
    # With every instruction set a part of them, with the best one all.
    every = 1 if twin.isa == BEST_ISA else 16
    counter = torch.arange(SIZE, dtype=torch.int32)
    remainder = torch.zeros(SIZE, dtype=torch.int8) if width == 8 else None
    run = assigning_run(remainder, torch.zeros(SIZE))
    random = random_bits(3, ASSIGN.step, 0, SIZE // 128, PARAM).flatten()
    random = (random >> (32 - width)).int()
    kept = -(1 << width)
    for index in range(0, 1 << 14, every):
        bits = counter + (INT32_MIN + index * SIZE)
        if index == 0:
            bits[0] = 0  # for the rule, -0 would be 0
        run.grad = bits.view(torch.float32)
        for tensor in (run.param, run.exp_avg, run.exp_avg_sq, run.master):
            if tensor is not None:
                tensor.zero_()
        twin.update([run])
        if index & 0x1FFF < 0x1FE0:  # finite
            # One of the neighbours in the format, by the random bits; never infinite.
            stored = stored_bits(run)
            rounded = (bits + random) & kept
            infinite = (rounded & 0x7FFFFFFF) == 0x7F800000
            assert torch.equal(stored, torch.where(infinite, bits & kept, rounded))
        else:
            # Of an infinite gradient the rule makes NaN, too.
            stored = stored_bits(run).view(torch.float32)
            assert stored.isnan().all() and run.param.isnan().all()
        if index % 256 == 0 and index & 0x1FFF < 0x1FE0:
            if width == 8:
                expected = reference.split8_master(run.grad, random)
                assert torch.equal(run.master, expected[1])
            else:
                expected = (reference.stochastic_param(run.grad, random),)
            assert torch.equal(run.param.view(torch.int16), expected[0].view(torch.int16))


def stored_bits(run: Run) -> Tensor:
    if run.master is None:
        return run.param.view(torch.int16).int() << 16
    return reference.join8_master(run.param, run.master).view(torch.int32)


@pytest.mark.parametrize("width", [8, 16])
def test_right_on_average(width):
    generator = torch.Generator().manual_seed(0)
    masters = torch.randn(1_000, 1, generator=generator).expand(-1, 1 << width).contiguous()
    random = torch.arange(1 << width).expand(1_000, -1)
    if width == 8:
        stored = reference.join8_master(*reference.split8_master(masters, random))
    else:
        stored = reference.stochastic_param(masters, random).float()
    # Over all random bits the mean is the master itself.
    assert torch.equal(stored.double().mean(1), masters[:, 0].double())


def test_what_is_24_bits_wide_comes_back():
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(100_000, generator=generator).bfloat16()
    remainder = torch.randint(-128, 128, param.shape, generator=generator).to(torch.int8)
    master = reference.join8_master(param, remainder)
    for random in (0, 255):
        again = reference.split8_master(master, torch.full(param.shape, random))
        assert torch.equal(again[0], param) and torch.equal(again[1], remainder)


def test_what_is_not_finite_stays_what_it_is():
    infinity = torch.tensor([float("inf"), float("-inf")])
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for random in (0, 255):
        masters = reference.join8_master(*reference.split8_master(infinity, torch.tensor(random)))
        assert torch.equal(masters, infinity)
        param, remainder = reference.split8_master(nan, torch.tensor(random))
        assert param.isnan().all() and reference.join8_master(param, remainder).isnan().all()
        assert torch.equal(reference.stochastic_param(infinity, torch.tensor(random)), infinity)
        assert reference.stochastic_param(nan, torch.tensor(random)).isnan().all()
