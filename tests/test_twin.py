"""The compiled twin gives the reference's bits: every format, variant, instruction set, length."""

import itertools

import pytest
import torch
from torch import Tensor

from shardadam.kernels import Coefficients, Run, reference

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FORMATS = [
    *((FP32, None, grad) for grad in (FP32, BF16, FP16)),
    (FP64, None, FP64),
    *((BF16, torch.int16, grad) for grad in (FP32, BF16, FP16)),
    *((BF16, FP32, grad) for grad in (FP32, BF16, FP16)),
    *((FP16, FP32, grad) for grad in (FP32, BF16, FP16)),
]
# AMSGrad or not, Nesterov momentum or not, weight decay by L2 or decoupled.
VARIANTS = list(itertools.product((False, True), repeat=3))
SPECIAL = [
    *(0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-42, 1e-38, 3.4e38, -3e38),
    *(65504.0, 65520.0, 6e-8, 2e-8, 1.00390625, -1.01171875),  # fp16's limits, bf16 ties
]


def coefficients(nesterov: bool, l2: bool) -> Coefficients:
    return Coefficients.fold(
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        bias_correction2=1 - 0.999**3,
        exp_avg_rate=1e-2 / (1 - 0.9**3),
        grad_rate=1e-3 if nesterov else 0.0,
        lr=1e-2,
        weight_decay=0.1,
        decoupled=not l2,
        grad_factor=-0.37,
    )


def make_run(formats, numel: int, amsgrad: bool, shared: Coefficients, start: int = 0) -> Run:
    """A run over elements [start, start + numel) of longer tensors, special values among them."""
    param_dtype, master_dtype, grad_dtype = formats
    moment_dtype = FP64 if param_dtype == FP64 else FP32
    generator = torch.Generator().manual_seed(numel)

    def values(dtype: torch.dtype) -> Tensor:
        size = numel + start + 3
        scale = 10.0 ** torch.randint(-6, 3, (size,), generator=generator)
        made = torch.randn(size, generator=generator, dtype=FP64) * scale
        chosen = torch.rand(size, generator=generator) < 0.05
        special = torch.tensor(SPECIAL, dtype=FP64)
        which = torch.randint(len(SPECIAL), (size,), generator=generator)
        return torch.where(chosen, special[which], made).to(dtype)

    param, master = values(param_dtype), None
    if master_dtype == torch.int16:
        param, master = reference.split_master(values(FP32))
    elif master_dtype is not None:
        master = values(FP32)
        # Some params were written since their master was rounded to them, some with the other zero.
        chance = torch.rand(len(param), generator=generator)
        written = torch.where(chance < 0.05, 0.5, -0.0)
        param = torch.where(chance < 0.1, written, master).to(param_dtype)
    tensors = [
        param,
        values(moment_dtype),
        values(moment_dtype).abs(),
        values(moment_dtype).abs() if amsgrad else None,
        master,
        values(grad_dtype),
    ]
    return Run(*(t if t is None else t[start : start + numel] for t in tensors), shared)


def whole(tensor: Tensor) -> Tensor:
    """All of the storage that a run's slice lies in."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def copy(run: Run) -> Run:
    def clone(tensor):
        if tensor is None:
            return None
        return whole(tensor).clone()[tensor.storage_offset() :][: tensor.numel()]

    tensors = (run.param, run.exp_avg, run.exp_avg_sq, run.max_exp_avg_sq, run.master, run.grad)
    return Run(*map(clone, tensors), run.coefficients)


def bits(tensor: Tensor) -> Tensor:
    """As integers, with one NaN for all."""
    tensor = whole(tensor)
    if not tensor.is_floating_point():
        return tensor
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integers)


def assert_same_bits(found: Run, expected: Run) -> None:
    """Also outside the runs; a NaN equals a NaN."""
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "grad"):
        left, right = getattr(found, name), getattr(expected, name)
        if left is None:
            assert right is None
        else:
            assert torch.equal(bits(left), bits(right)), name


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_equals_reference_for_every_length_and_start(formats, twin):
    for amsgrad, nesterov, l2 in VARIANTS:
        if amsgrad and nesterov:
            continue  # there is no such optimizer
        shared = coefficients(nesterov, l2)
        runs = [make_run(formats, numel, amsgrad, shared, start=numel % 5) for numel in range(301)]
        expected = [copy(run) for run in runs]
        for run in expected:
            reference.update(run)
        twin.update(runs)
        for run, other in zip(runs, expected, strict=True):
            assert_same_bits(run, other)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_threads_and_neighbours_change_nothing(formats, twin):
    # Together enough for two threads; the cut, at half of them, lies in the middle of a run.
    plain, nesterov = coefficients(False, False), coefficients(True, True)
    runs = [
        make_run(formats, numel, amsgrad, shared, start)
        for numel, amsgrad, shared, start in (
            (0, False, plain, 0),
            (1, True, plain, 1),
            (70_001, False, nesterov, 2),
            (0, True, plain, 0),
            (129, True, plain, 0),
            (140_003, False, plain, 3),
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


def test_no_runs(twin):
    twin.update([])


def test_an_unknown_combination_changes_nothing(twin):
    shared = coefficients(False, False)
    good = make_run((FP32, None, FP32), 10, False, shared)
    bad = make_run((FP32, None, FP64), 10, False, shared)
    before = copy(good)
    with pytest.raises(ValueError, match=r"no kernel for torch\.float32 params with no master and"):
        twin.update([good, bad])
    assert_same_bits(good, before)
