"""The CUDA kernel for coded state and stochastic masters, run on the CPU, gives the twin's bits.

What this can't show: cuda_on_cpu/shim.h.
"""

import faulthandler
import os
import signal
from dataclasses import replace

import pytest
import torch

from coded_runs import BLOCK, BY_BLOCKS, STATES, gradients, zero_run
from kernel_runs import (
    BF16,
    FP16,
    FP32,
    FP64,
    TENSORS,
    VARIANTS,
    assert_same_bits,
    coefficients,
    copy,
    lazily_mapped,
)
from shardadam.kernels import Coefficients, Run, Slot, backend_for
from shimmed_cuda import library

TWIN = backend_for(torch.device("cpu"))
# Around a lane's 8 elements, a block, two blocks (a warp's), eight (a thread block's).
LENGTHS = [1, 7, 8, 9, 120, 127, 128, 129, 200, 256, 257, 1_000, 1_025]


def coded_run(
    state: str,
    master: str,
    numel: int,
    dtype: torch.dtype = FP32,
    amsgrad: bool = False,
    shared: Coefficients | None = None,
    start: int = 0,
) -> Run:
    """A run of `zero_run` that has taken two steps, over elements from ``start`` on of longer ones.

    ``start`` need not be a multiple of a block: then a run's blocks begin where it does.
    """
    shared = shared or coefficients(False, False)
    whole = numel + start + 5
    values = torch.randn(whole, generator=torch.Generator().manual_seed(numel))
    run = zero_run(state, master, gradients(whole, dtype, 1), shared, amsgrad, values)
    for seed in (2, 3):
        TWIN.update([run])
        run.grad = gradients(whole, dtype, seed)
    blocks = slice(start // BLOCK, start // BLOCK - (-numel // BLOCK))
    cut = {
        name: tensor[blocks if name.endswith("scale") else slice(start, start + numel)]
        for name in TENSORS
        if (tensor := getattr(run, name)) is not None
    }
    return replace(run, **cut, prepared=None)


def assert_twins(kernels, runs: list[Run], steps: int = 2) -> None:
    """The same bits after some steps."""
    expected = [copy(run) for run in runs]
    for step in range(steps):
        for run, other in zip(runs, expected, strict=True):
            shared = replace(run.coefficients, step=run.coefficients.step + 1)
            run.coefficients = other.coefficients = shared
            run.grad.copy_(gradients(len(run.grad), run.grad.dtype, 10 + step))
            other.grad.copy_(run.grad)
        TWIN.update(expected)
        kernels.update(runs)
        for run, other in zip(runs, expected, strict=True):
            assert_same_bits(run, other)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("state", "master"), BY_BLOCKS)
def test_equals_the_twin(state, master, dtype, kernels, device):
    for amsgrad, nesterov, l2 in VARIANTS:
        shared = coefficients(nesterov, l2)
        runs = [
            coded_run(state, master, numel, dtype, amsgrad, shared, start=128 * (number % 3))
            for number, numel in enumerate(LENGTHS)
        ]
        assert_twins(kernels, runs)
    assert set(device.launched) == {"shardadam_update_blocks"}


@pytest.mark.parametrize(("state", "master"), BY_BLOCKS)
def test_unaligned_runs_and_gradients(state, master, kernels):
    # Blocks begin where a run does, wherever that is; in DDP's buckets gradients lie anywhere.
    for start, shift in ((1, 0), (8, 3), (130, 0), (0, 1), (256, 4)):
        runs = [coded_run(state, master, numel, BF16, True, start=start) for numel in (129, 700)]
        for run in runs:
            grad = torch.zeros(run.grad.numel() + 8, dtype=BF16)[shift:][: run.grad.numel()]
            run.grad = grad.copy_(run.grad)
        assert_twins(kernels, runs)


@pytest.mark.parametrize("grid", [(1, 32), (2, 96), (3, 128), (40, 64)], ids=str)
def test_every_grid_is_right(grid, kernels, device):
    device.grid = grid
    for state, master in (("q16", "split"), ("q8", "split8"), ("bf16", "none"), ("fp32", "split8")):
        assert_twins(kernels, [coded_run(state, master, n, BF16) for n in (5, 8_192, 20_011)], 1)


@pytest.mark.parametrize("state", ["q16", "q8"])
def test_from_any_codes(state, kernels):
    # Codes and scales that no training has led to, also where the scale is 0.
    generator = torch.Generator().manual_seed(0)
    numel = 60 * BLOCK + 17
    run = coded_run(state, "split", numel, amsgrad=True)
    run.exp_avg.copy_(torch.randint(-127, 128, (numel,), generator=generator))
    low, high = (0, 256) if state == "q8" else (-(1 << 15), 1 << 15)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        codes, scale = getattr(run, name), getattr(run, f"{name}_scale")
        if name != "exp_avg":
            codes.copy_(torch.randint(low, high, (numel,), generator=generator))
        exponents = torch.randint(-20, 19, scale.shape, generator=generator)
        zero = torch.rand(scale.shape, generator=generator) < 0.1
        scale.copy_(torch.where(zero, 0.0, 10.0**exponents))
        codes[zero.repeat_interleave(BLOCK)[:numel]] = 0  # only zeros have the scale 0
    assert_twins(kernels, [run])


@pytest.mark.parametrize("master", ["split", "bf16 and fp32"])
@pytest.mark.parametrize("l2", [False, True])
def test_gradients_at_the_limits(master, l2, kernels):
    # Where the gradient, its square or the factor leaves what can be stored, in single elements and
    # in all of a block.
    limits = [2.0**k for k in (58, 59, 60, 61, 62, 63, 64, 100, 127, -75, -100, -149)]
    for factor in (-0.37, 1e3, 1e-3):
        shared = replace(coefficients(False, l2), grad_factor=factor)
        for state in STATES:
            if state == "fp32":
                continue
            run = coded_run(state, master, 40 * BLOCK, shared=shared)
            for number, limit in enumerate(limits):
                for sign, block in ((1, 2 * number), (-1, 2 * number + 1)):
                    run.grad[BLOCK * block + 5 * number] = sign * limit
                run.grad[BLOCK * (24 + number) :][:BLOCK] = limit
            other = copy(run)
            TWIN.update([other])
            kernels.update([run])
            assert_same_bits(run, other)


def test_beyond_two_to_the_31_elements(kernels, device):
    numel = 2**31 + 1_000_003
    tensors = {
        "param": lazily_mapped(numel, BF16),
        "master": lazily_mapped(numel, torch.int8),
        "exp_avg": lazily_mapped(numel, torch.int8),
        "exp_avg_sq": lazily_mapped(numel, torch.uint8),
        "grad": lazily_mapped(numel, BF16),
        "exp_avg_scale": lazily_mapped(-(-numel // BLOCK), BF16),
        "exp_avg_sq_scale": lazily_mapped(-(-numel // BLOCK), BF16),
    }
    run = replace(coded_run("q8", "split8", 8, BF16), **tensors, prepared=None)
    parts = -(-numel // 8192)
    # Around the start, 2^31 and the end: what lies between stays unmapped.
    chosen = [range(1), range(2**31 // 8192 - 1, 2**31 // 8192 + 1), range(parts - 1, parts)]
    for blocks in chosen:
        elements = slice(8192 * blocks.start, min(8192 * blocks.stop, numel))
        in_blocks = slice(elements.start // BLOCK, -(-elements.stop // BLOCK))
        cut = {
            name: tensor[in_blocks if name.endswith("scale") else elements]
            for name, tensor in tensors.items()
        }
        cut["grad"].copy_(gradients(len(cut["grad"]), BF16, blocks.start))
        piece = replace(run, **cut, first_block=run.first_block + in_blocks.start, prepared=None)
        other = replace(piece, **{name: tensor.clone() for name, tensor in cut.items()})
        TWIN.update([other])
        device.blocks = blocks
        kernels.update([run])
        for name, tensor in cut.items():
            found, wanted = tensor, getattr(other, name)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert cut["exp_avg_sq_scale"].any()


def test_runs_of_one_bucket_are_one_launch(kernels, device):
    whole = coded_run("q8", "none", 100 * BLOCK, BF16)
    runs = []
    for index in range(100):  # of 128, 127, … elements: spans with padding between them
        part, block = slice(BLOCK * index, BLOCK * index + BLOCK - index), slice(index, index + 1)
        cut = {
            name: tensor[block if name.endswith("scale") else part]
            for name in TENSORS
            if (tensor := getattr(whole, name)) is not None
        }
        runs.append(replace(whole, **cut, first_block=1_000 * index, prepared=None))
    expected = [copy(run) for run in runs]
    TWIN.update(expected)
    kernels.update(runs)
    assert device.launched == ["shardadam_update_blocks"] * 2  # 96 runs, and 4
    for run, other in zip(runs, expected, strict=True):
        for name in TENSORS:
            found, wanted = getattr(run, name), getattr(other, name)
            if found is not None:
                torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_runs_of_other_seeds_are_launched_apart(kernels, device):
    whole = coded_run("q16", "split8", 2 * BLOCK)
    runs = [replace(copy(whole), seed=seed) for seed in (1, 2, 1)]
    expected = [copy(run) for run in runs]
    TWIN.update(expected)
    kernels.update(runs)
    for run, other in zip(runs, expected, strict=True):
        assert_same_bits(run, other)
    assert not torch.equal(runs[0].master, runs[1].master)


def test_the_step_is_read_on_the_device(kernels):
    # As in the replay of a CUDA graph: the same launch, other coefficients.
    shared = coefficients(False, False)
    run = coded_run("q8", "none", 1_000, BF16, shared=shared)
    other = copy(run)
    table = torch.zeros(3, 11, dtype=FP64)
    run.coefficients = Slot(table, 2, nesterov=False, l2=False)
    for step in (4.0, 5.0, 2.0**24):
        other.coefficients = replace(shared, step=step, beta1=0.8)
        table[2] = torch.tensor(
            [getattr(other.coefficients, name) for name in Coefficients.__slots__], dtype=FP64
        )
        kernels.update([run])
        TWIN.update([other])
        assert_same_bits(replace(run, coefficients=None), replace(other, coefficients=None))
    kernels.update([run], skip=torch.tensor(1.0))
    assert_same_bits(run, other)


def test_what_a_run_must_be(kernels, device):
    good = coded_run("q16", "split", 300, amsgrad=True)
    before = copy(good)
    for change, message in (
        ({"grad": torch.zeros(300, dtype=FP64)}, "no kernel for torch.bfloat16 params with a"),
        ({"exp_avg": torch.zeros(300, dtype=BF16)}, "exp_avg in torch.bfloat16 and exp_avg_sq in"),
        ({"param": torch.zeros(300, dtype=FP64), "master": None}, "no kernel for torch.float64"),
        ({"param": torch.zeros(300, dtype=FP16)}, "no kernel for torch.float16 params with a"),
        ({"exp_avg_scale": None}, "a run with coded state has no exp_avg_scale"),
        ({"max_exp_avg_sq_scale": None}, "a run with coded state has no max_exp_avg_sq_scale"),
        ({"exp_avg_sq_scale": torch.zeros(2, dtype=BF16)}, "_scale of a run .* expected 3 contig"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.update([good, replace(good, **change, prepared=None)])
    assert_same_bits(good, before)
    assert not device.launched


@pytest.mark.parametrize("threads", [1, 33])
def test_the_shim_sees_a_lane_that_does_not_shuffle(threads, kernels, device, capfd):
    # The kernel takes whole warps; of others some lanes would wait for ever.
    run = coded_run("q16", "split", 300)
    device.grid = (1, threads)
    library("coded_kernels.cpp")  # once, for both
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # its report would be taken for a failure's
        kernels.update([run])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT
    assert "a GPU would not do this: a thread waits for ever" in capfd.readouterr().err
