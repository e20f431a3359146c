"""The split master: a bfloat16 param and a 16-bit remainder are a float32, for all 2^32 of them."""

import pytest
import torch

import shardadam
from shardadam.kernels import Coefficients, Run, reference

INT32_MIN = -(1 << 31)
# A split in all respects: the bits of a float, and of the bfloat16 and the remainder it becomes.
TRAPS = [
    (0x3F808000, 0x3F81, -0x8000),  # a tie, away from zero: to even would need one code more
    (0xBF808000, 0xBF81, -0x8000),
    (0x3F818000, 0x3F82, -0x8000),
    (0x3F807FFF, 0x3F80, 0x7FFF),
    (0x00000001, 0x0000, 1),  # a subnormal whose param is zero
    (0x80000001, 0x8000, 1),
    (0x80000000, 0x8000, 0),
    (0x7F7FFFFF, 0x7F80, -1),  # the largest float: the param is infinite, the master is not
    (0x7F800000, 0x7F80, 0),
    (0x7FFFFFFF, 0x7FFF, 0),  # a NaN that would wrap around to -0
    (0xFFFFFFFF, 0xFFFF, 0),
    (0x7F800001, 0x7FC0, 0),  # a NaN that would become infinite
    (0xFF80FFFF, 0xFFC0, 0),
]


def signed(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


def test_all_patterns(twin):
    # In blocks that stay in the cache: seconds for all 2^32, where large ones take minutes.
    block = 1 << 18
    counter = torch.arange(block, dtype=torch.int32)
    for index in range(1 << 14):
        bits = counter + (INT32_MIN + index * block)
        master = bits.view(torch.float32)
        param, remainder = twin.split(master)
        joined = twin.join(param, remainder)
        if index & 0x1FFF < 0x1FE0:  # finite
            assert torch.equal(joined.view(torch.int32), bits)
        else:
            nan = master.isnan()
            assert torch.equal(param.isnan(), nan)
            assert torch.equal(joined.isnan(), nan)
            assert torch.equal(joined[~nan], master[~nan])
        if index % 16 == 0:
            expected = reference.split_master(master)
            assert torch.equal(param.view(torch.int16), expected[0].view(torch.int16))
            assert torch.equal(remainder, expected[1])
            assert torch.equal(
                reference.join_master(*expected).view(torch.int32), joined.view(torch.int32)
            )


def test_the_param_is_the_nearest_bfloat16(twin):
    # All lower halves, where rounding happens, under upper halves of either sign and any exponent.
    lower = torch.arange(1 << 16, dtype=torch.int32)
    for upper in range(-(1 << 15), 1 << 15, 61):
        if upper & 0x7F80 == 0x7F80:
            continue
        bits = (upper << 16) + lower
        param = twin.split(bits.view(torch.float32))[0].view(torch.int16).int()
        # Sign and magnitude: half of the distance to the next one, or more, rounds away from zero.
        assert torch.equal(param - upper, (lower >= 1 << 15).int())


@pytest.mark.parametrize(("bits", "param", "remainder"), TRAPS)
def test_traps(bits, param, remainder, twin):
    # At every place of a vector and of the tail.
    masters = torch.full((300,), signed(bits), dtype=torch.int32).view(torch.float32)
    for split, join in (
        (twin.split, twin.join),
        (reference.split_master, reference.join_master),
    ):
        high, low = split(masters)
        assert set(high.view(torch.int16).tolist()) == {signed(param << 16) >> 16}
        assert set(low.tolist()) == {remainder}
        joined = join(high, low)
        if masters[0].isnan():
            assert joined.isnan().all()
        else:
            assert torch.equal(joined.view(torch.int32), masters.view(torch.int32))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_param_set_to_zero_is_no_nan(zero, twin):
    remainder = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    param = torch.full(remainder.shape, zero, dtype=torch.bfloat16)
    for join in (twin.join, reference.join_master):
        master = join(param, remainder)
        assert (
            master[remainder <= 0].view(torch.int32) == torch.tensor(zero).view(torch.int32)
        ).all()
        assert (master.abs() < 2.0**-133).all()  # half of the least bfloat16


@pytest.mark.parametrize("master", ["split", "split8"])
def test_training_goes_on_after_params_were_set_to_zero(master):
    param = torch.nn.Parameter(
        torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    )
    optimizer = shardadam.AdamW([param], master=master)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    with torch.no_grad():
        param[::2].zero_()
        param[1::4].mul_(-0.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(param[::2], torch.full_like(param[::2], -1e-3))


def test_a_nan_gradient_of_any_payload_makes_the_param_nan(twin):
    payloads = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC0FFFF]
    grad = torch.tensor([signed(bits) for bits in payloads] * 70, dtype=torch.int32)
    grad = grad.view(torch.float32)
    param, remainder = reference.split_master(torch.full((280,), 1.5))
    moments = [torch.zeros(280) for _ in range(2)]
    shared = Coefficients(0.9, 0.999, 0.1, 0.001, 0.0, 1e-3, 1e-8, 1.0, 0.0, 1.0)
    twin.update([Run(param, *moments, None, remainder, grad, shared)])
    assert param.isnan().all() and moments[0].isnan().all()


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam"])
def test_training_is_that_of_float32_params(kind):
    # What bfloat16 params and remainders hold is bit for bit what float32 params would.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(10_001, generator=generator)
    full, half = torch.nn.Parameter(start.bfloat16().float()), torch.nn.Parameter(start.bfloat16())
    optimizers = [getattr(shardadam, kind)([param], weight_decay=0.1) for param in (full, half)]
    for _ in range(50):
        grad = torch.randn(10_001, generator=generator).bfloat16()
        full.grad, half.grad = grad.float(), grad
        for optimizer in optimizers:
            optimizer.step()
    states = [optimizers[0].state[full], optimizers[1].state[half]]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(states[0][name], states[1][name])
    assert torch.equal(half, reference.split_master(full.detach())[0])
