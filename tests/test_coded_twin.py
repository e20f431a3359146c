"""Coded state and stochastic masters: the compiled twin gives the reference's bits."""

from dataclasses import replace

import pytest
import torch

from coded_runs import BY_BLOCKS, STATES, gradients, zero_run
from kernel_runs import BF16, FP16, FP32, FP64, VARIANTS, assert_same_bits, coefficients, copy
from shardadam.kernels import Coefficients, Hyperparameters, fold, reference

STEPS = 4


def steps_of(shared: Coefficients) -> list[Coefficients]:
    return [replace(shared, step=float(step)) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("state", "master"), BY_BLOCKS)
def test_equals_reference(state, master, dtype, twin):
    for amsgrad, nesterov, l2 in VARIANTS:
        for numel in (1, 127, 128, 130, 1_000):
            first, *later = steps_of(coefficients(nesterov, l2))
            start = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
            grad = gradients(numel, dtype, seed=0)
            run = zero_run(state, master, grad, first, amsgrad, start)
            expected = copy(run)
            reference.update(expected)
            twin.update([run])
            assert_same_bits(run, expected)
            for seed, shared in enumerate(later):
                run.coefficients = expected.coefficients = shared
                run.grad = expected.grad = gradients(numel, dtype, seed)
                reference.update(expected)
                twin.update([run])
                assert_same_bits(run, expected)


@pytest.mark.parametrize("factor", [1e-30, -1e30])
@pytest.mark.parametrize("beta", [0.0, 1 - 1e-9])
@pytest.mark.parametrize("state", ["bf16", "q16", "q8"])
def test_equals_reference_with_extreme_coefficients(state, beta, factor, twin):
    # Gradients that reach the limit, and limits beyond float; a beta that float would make 1.
    for l2 in (0.0, 0.1):
        hyper = Hyperparameters(1e-2, beta, beta, 1e-8, l2, decoupled=False, maximize=False)
        grad = gradients(1_000, FP32, seed=0)
        run = zero_run(state, "split", grad, fold(hyper, 1.0), True, torch.ones(1_000))
        for step in range(1, STEPS + 1):
            run.coefficients = fold(hyper, float(step), 1.0, factor)
            expected = copy(run)
            reference.update(expected)
            twin.update([run])
            assert_same_bits(run, expected)
        assert (run.exp_avg_sq != 0).any()


@pytest.mark.parametrize("state", ["q16", "q8"])
def test_equals_reference_from_any_codes(state, twin):
    # Codes and scales that no training has led to, also where the scale is 0.
    generator = torch.Generator().manual_seed(0)
    numel = 100 * 128 + 17
    averages, squares = STATES[state]
    run = zero_run(
        state,
        "split",
        gradients(numel, FP32, 0),
        coefficients(False, False),
        True,
        torch.randn(numel, generator=generator),
    )
    run.exp_avg.copy_(torch.randint(-127, 128, (numel,), generator=generator))
    for codes in (run.exp_avg_sq, run.max_exp_avg_sq):
        low, high = (0, 256) if state == "q8" else (-(1 << 15), 1 << 15)
        codes.copy_(torch.randint(low, high, (numel,), generator=generator))
    for codes, scale in (
        (run.exp_avg, run.exp_avg_scale),
        (run.exp_avg_sq, run.exp_avg_sq_scale),
        (run.max_exp_avg_sq, run.max_exp_avg_sq_scale),
    ):
        exponents = torch.randint(-20, 19, scale.shape, generator=generator)
        zero = torch.rand(scale.shape, generator=generator) < 0.1
        scale.copy_(torch.where(zero, 0.0, 10.0**exponents))
        codes[zero.repeat_interleave(128)[:numel]] = 0  # only zeros have the scale 0
    assert run.exp_avg.dtype == averages and run.exp_avg_sq.dtype == squares
    expected = copy(run)
    reference.update(expected)
    twin.update([run])
    assert_same_bits(run, expected)


def test_threads_and_neighbours_change_nothing(twin):
    # Together enough for two threads. The cut, at half of them, lies in a run and in a block of it:
    # before it come 129 elements.
    plain, nesterov = coefficients(False, False), coefficients(True, True)
    runs = [
        zero_run(state, master, gradients(numel, FP32, numel), shared, amsgrad, torch.ones(numel))
        for state, master, numel, amsgrad, shared in (
            ("q8", "split8", 1, True, plain),
            ("bf16", "none", 128, False, nesterov),
            ("q16", "split", 140_003, False, plain),
            ("fp32", "split8", 70_001, False, nesterov),
        )
    ]
    expected, threaded = [copy(run) for run in runs], [copy(run) for run in runs]
    for run in expected:
        reference.update(run)
    twin.update(runs)
    torch.set_num_threads(2)
    twin.update(threaded)
    torch.set_num_threads(1)
    for run, other, oracle in zip(runs, threaded, expected, strict=True):
        assert_same_bits(run, oracle)
        assert_same_bits(other, oracle)


@pytest.mark.parametrize(
    ("state", "master", "change"),
    [
        ("q16", "split", {"grad": torch.zeros(10, dtype=FP64)}),
        ("q16", "split", {"exp_avg": torch.zeros(10, dtype=BF16)}),
        ("bf16", "fp32 param", {"param": torch.zeros(10, dtype=FP64)}),
        ("q8", "none", {"param": torch.zeros(10, dtype=FP16)}),
    ],
)
def test_an_unknown_combination_changes_nothing(state, master, change, twin):
    run = zero_run(state, master, torch.ones(10), coefficients(False, False), False, torch.ones(10))
    before = copy(run)
    with pytest.raises(ValueError, match=r"no kernel for torch\.\w+ params .* exp_avg_sq in torch"):
        twin.update([run, replace(run, **change)])
    assert_same_bits(run, before)
