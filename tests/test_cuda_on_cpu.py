"""The CUDA kernels' own text, run on the CPU, gives the bits of the CPU twin.

So the loops, the vectors, the index arithmetic and the structs that Python passes are right. What
this can't show: cuda_on_cpu/shim.h.
"""

import ctypes
import random

import pytest
import torch

from kernel_runs import (
    BF16,
    FORMATS,
    FP32,
    FP64,
    VARIANTS,
    assert_same_bits,
    coefficients,
    copy,
    lazily_mapped,
    make_run,
)
from shardadam.kernels import Hyperparameters, Row, Run, backend_for, exact_sum, fold
from shardadam.kernels.cuda_arguments import Batch, Rows

TWIN = backend_for(torch.device("cpu"))
# In lengths around vectors, parts of 8192 elements, and several parts.
LENGTHS = [*range(40), 127, 128, 129, 8191, 8192, 8193, 20_011]


def with_grad_at(run: Run, offset: int) -> Run:
    """With the gradient at another alignment than the rest, as in DDP's buckets."""
    grad = torch.empty(run.grad.numel() + 8, dtype=run.grad.dtype)[offset:][: run.grad.numel()]
    run.grad = grad.copy_(run.grad)
    return run


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_equals_the_twin_at_every_length_and_alignment(formats, kernels):
    for amsgrad, nesterov, l2 in VARIANTS:
        shared = coefficients(nesterov, l2)
        runs = [
            with_grad_at(make_run(formats, numel, amsgrad, shared, start=start), number % 3)
            for number, (numel, start) in enumerate((n, s) for n in LENGTHS for s in (0, 3, 8))
        ]
        expected = [copy(run) for run in runs]
        TWIN.update(expected)
        kernels.update(runs)
        for run, other in zip(runs, expected, strict=True):
            assert_same_bits(run, other)


@pytest.mark.parametrize("grid", [(1, 1), (1, 32), (2, 96), (7, 128), (10_000, 128)], ids=str)
def test_every_grid_is_right(grid, kernels, device):
    device.grid = grid
    shared = coefficients(False, False)
    for formats in FORMATS:
        runs = [make_run(formats, numel, False, shared) for numel in (1, 5_000, 30_007)]
        expected = [copy(run) for run in runs]
        TWIN.update(expected)
        kernels.update(runs)
        for run, other in zip(runs, expected, strict=True):
            assert_same_bits(run, other)


def test_more_runs_than_a_launch_takes(kernels, device):
    shared = coefficients(False, False)
    param, moment, square = torch.randn(3, 1000 * 128).unbind()
    square = square.abs()
    grads = torch.randn(1000, 100)
    runs, expected = [], []
    for index in range(1000):
        part = slice(128 * index, 128 * index + 100)
        kept = (param[part], moment[part], square[part])
        runs.append(Run(*kept, None, None, grads[index], shared))
        expected.append(Run(*(t.clone() for t in kept), None, None, grads[index], shared))
    TWIN.update(expected)
    kernels.update(runs)
    assert device.launched == ["shardadam_update"] * 11
    for run, other in zip(runs, expected, strict=True):
        for name in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(run, name), getattr(other, name))


def test_every_bucket_keeps_its_launches(kernels, device):
    shared = coefficients(False, False)
    buckets = [[make_run((FP32, None, FP32), n, False, shared) for n in (300, 5)] for _ in range(3)]
    made = []
    for _ in range(2):
        for runs in buckets:
            kernels.update(runs)
        made.append([kernels._updates_for(runs) for runs in buckets])
    assert all(first is second for first, second in zip(*made, strict=True))


@pytest.mark.parametrize("formats", [(FP32, None, FP32), (BF16, torch.int16, BF16)], ids=str)
def test_beyond_two_to_the_31_elements(formats, kernels, device):
    numel = 2**31 + 1_000_003
    param_dtype, master_dtype, grad_dtype = formats
    run = Run(
        lazily_mapped(numel, param_dtype),
        lazily_mapped(numel, FP32),
        lazily_mapped(numel, FP32),
        None,
        None if master_dtype is None else lazily_mapped(numel, master_dtype),
        lazily_mapped(numel, grad_dtype),
        coefficients(False, False),
    )
    tensors = [
        t for t in (run.param, run.exp_avg, run.exp_avg_sq, run.master, run.grad) if t is not None
    ]
    parts = -(-numel // 8192)
    # Around the start, 2^31 and the end: what lies between stays unmapped.
    chosen = [range(2), range(2**31 // 8192 - 2, 2**31 // 8192 + 2), range(parts - 2, parts)]
    expected = []
    for blocks in chosen:
        part = slice(8192 * blocks.start, min(8192 * blocks.stop, numel))
        for tensor in tensors:
            if tensor.dtype == torch.int16:
                tensor[part].random_()
            else:
                tensor[part].normal_().abs_()
        fields = (run.param, run.exp_avg, run.exp_avg_sq, None, run.master, run.grad)
        pieces = (None if tensor is None else tensor[part].clone() for tensor in fields)
        expected.append((part, Run(*pieces, run.coefficients)))
    TWIN.update([piece for _, piece in expected])
    for blocks in chosen:
        device.blocks = blocks
        kernels.update([run])
    for part, piece in expected:
        for name in ("param", "exp_avg", "exp_avg_sq", "master"):
            if getattr(run, name) is not None:
                assert torch.equal(getattr(run, name)[part], getattr(piece, name)), (name, part)


def test_what_a_run_must_be(kernels, device):
    good = make_run((FP32, None, FP32), 100, False, coefficients(False, False))
    before = copy(good)
    for change, message in (
        ({"grad": torch.zeros(99)}, r"grad of a run has shape \(99,\) .* expected 100 contiguous"),
        ({"exp_avg": torch.zeros(200)[::2]}, r"exp_avg of a run .* strides \(2,\)"),
        ({"grad": torch.zeros(100, dtype=FP64)}, "no kernel for torch.float32 params with no"),
        ({"param": torch.zeros(100, dtype=torch.int64)}, "no kernel for torch.int64 params"),
        ({"exp_avg": torch.zeros(100, device="meta")}, "exp_avg of a run is on meta: expected cpu"),
    ):
        fields = {name: getattr(good, name) for name in Run.__slots__ if name != "prepared"}
        with pytest.raises(ValueError, match=message):
            kernels.update([good, Run(**{**fields, **change})])
    assert_same_bits(good, before)
    assert not device.launched


# ---- the norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, torch.float16], ids=str)
def test_sums_of_squares(dtype, kernels):
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for numel in (0, 1, 127, 128, 129, 5_000, 8_193, 40_000):
        scale = 10.0 ** torch.randint(-7, 6, (numel + 1,), generator=generator)
        made = torch.randn(numel + 1, generator=generator, dtype=FP64) * scale
        tensors.append(made.to(dtype)[1:])
    found, expected = exact_sum.zero(), exact_sum.zero()
    kernels.sum_squares(tensors, found)
    TWIN.sum_squares(tensors, expected)
    assert torch.equal(found, expected)
    root = kernels.root(found)
    assert root.item() == exact_sum.root(found) or (root.isnan() and found[-1] > 0)


def test_infinities_and_nans_are_counted(kernels):
    tensors = [torch.tensor([1.0, float("inf"), float("-inf")]), torch.tensor([float("nan")] * 300)]
    found, expected = exact_sum.zero(), exact_sum.zero()
    kernels.sum_squares(tensors, found)
    TWIN.sum_squares(tensors, expected)
    assert torch.equal(found, expected) and kernels.root(found).isnan()
    only_infinite = exact_sum.zero()
    kernels.sum_squares(tensors[:1], only_infinite)
    assert kernels.root(only_infinite) == float("inf")


def test_roots_are_rounded_as_on_the_host(kernels):
    rng = random.Random(0)
    for _ in range(20_000):
        words = [0] * exact_sum.WORDS
        top = rng.randrange(exact_sum.LIMBS)
        for limb in range(max(0, top - rng.randrange(6)), top + 1):
            words[limb] = rng.choice(
                [0, 2**32 - 1, 1 << rng.randrange(40), rng.getrandbits(rng.choice([1, 20, 33, 62]))]
            )
        words[rng.randrange(top + 1)] += rng.randrange(2)
        tensor = torch.tensor(words)
        assert kernels.root(tensor).item() == exact_sum.root(tensor), words


# ---- steps and coefficients ---------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3, 10, 999, 100_000, 2**24 - 1])
def test_coefficients_are_folded_as_on_the_host(step, kernels):
    rows, expected = [], []
    for number in range(100):
        rng = random.Random(number)
        hyper = Hyperparameters(
            lr=rng.choice([1e-3, 0.3, 1e-6]),
            beta1=rng.choice([0.9, 0.0, 0.95]),
            beta2=rng.choice([0.999, 0.95, 0.5]),
            eps=rng.choice([1e-8, 1e-6]),
            weight_decay=rng.choice([0.0, 0.01, 0.1]),
            decoupled=rng.random() < 0.5,
            maximize=rng.random() < 0.5,
            momentum_decay=rng.choice([None, 4e-3, 0.1]),
        )
        products = torch.rand(3, dtype=FP64, generator=torch.Generator().manual_seed(number))
        nesterov = hyper.momentum_decay is not None
        row = Row(
            hyper=hyper,
            lr=torch.tensor(0.7, dtype=FP64) if number % 5 == 0 else None,
            step=torch.full((3,), step - 1.0),
            mu_product=products.clone() if nesterov else None,
            coefficients=torch.zeros(3, 11, dtype=FP64),
            first=1,
            count=2,
        )
        rows.append(row)
        lr = hyper.lr if row.lr is None else 0.7
        hyper = Hyperparameters(**{n: getattr(hyper, n) for n in hyper.__slots__} | {"lr": lr})
        counted, folded = torch.full((3,), step - 1.0), torch.zeros(3, 11, dtype=FP64)
        for span in (1, 2):
            counted[span] += 1
            if nesterov:
                products[span] *= hyper.momentum(step)
            own = fold(hyper, step, products[span].item() if nesterov else 1.0, -0.3)
            folded[span] = torch.tensor([getattr(own, n) for n in own.__slots__], dtype=FP64)
        expected.append((counted, products, folded))
    kernels.advance(rows, factor=torch.tensor(-0.3, dtype=FP64))
    for row, (counted, products, folded) in zip(rows, expected, strict=True):
        assert torch.equal(row.step, counted)
        assert row.mu_product is None or torch.equal(row.mu_product, products)
        assert torch.equal(row.coefficients, folded)


def test_skipping(kernels):
    run = make_run((FP32, None, FP32), 1000, False, coefficients(False, False))
    before = copy(run)
    kernels.update([run], skip=torch.tensor(1.0))
    assert_same_bits(run, before)
    step, table = torch.zeros(1), torch.zeros(1, 11, dtype=FP64)
    hyper = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)
    row = Row(hyper, None, step, None, table, 0, 1)
    kernels.advance([row], skip=torch.tensor(1.0))
    assert not step.any() and not table.any()
    kernels.advance([row], skip=torch.tensor(0.0))
    assert step == 1


def test_arguments_fit_into_what_every_gpu_takes():
    for struct in (Batch, Rows):
        assert ctypes.sizeof(struct) <= 4096
