"""Runs for the tests of kernels: every format, special values, memory around them."""

import itertools
import mmap
from dataclasses import replace

import torch
from torch import Tensor

from shardadam.kernels import Coefficients, Hyperparameters, Run, fold, reference

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FORMATS = [
    *((FP32, None, grad) for grad in (FP32, BF16, FP16)),
    (FP64, None, FP64),
    *((BF16, torch.int16, grad) for grad in (FP32, BF16, FP16)),
    *((BF16, FP32, grad) for grad in (FP32, BF16, FP16)),
    *((FP16, FP32, grad) for grad in (FP32, BF16, FP16)),
]
TENSORS = (
    *("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "grad"),
    *("exp_avg_scale", "exp_avg_sq_scale", "max_exp_avg_sq_scale"),
)
# AMSGrad or not, Nesterov momentum or not, weight decay by L2 or decoupled.
VARIANTS = [
    (amsgrad, nesterov, l2)
    for amsgrad, nesterov, l2 in itertools.product((False, True), repeat=3)
    if not (amsgrad and nesterov)  # there is no such optimizer
]
SPECIAL = [
    *(0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-42, 1e-38, 3.4e38, -3e38),
    *(65504.0, 65520.0, 6e-8, 2e-8, 1.00390625, -1.01171875),  # fp16's limits, bf16 ties
]


def coefficients(nesterov: bool, l2: bool) -> Coefficients:
    hyper = Hyperparameters(
        lr=1e-2,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.1,
        decoupled=not l2,
        maximize=False,
        momentum_decay=4e-3 if nesterov else None,
    )
    return fold(hyper, 3.0, mu_product=0.12, grad_factor=-0.37)


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
        # Some params were set to zero since their master was split.
        chance = torch.rand(len(param), generator=generator)
        param = torch.where(chance < 0.1, torch.where(chance < 0.05, 0.0, -0.0), param).to(BF16)
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

    return replace(run, **{name: clone(getattr(run, name)) for name in TENSORS}, prepared=None)


def bits(tensor: Tensor) -> Tensor:
    """As integers, with one NaN for all."""
    tensor = whole(tensor)
    if not tensor.is_floating_point():
        return tensor
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integers)


def assert_same_bits(found: Run, expected: Run) -> None:
    """Also outside the runs; a NaN equals a NaN."""
    for name in TENSORS:
        left, right = getattr(found, name), getattr(expected, name)
        if left is None:
            assert right is None
        else:
            assert torch.equal(bits(left), bits(right)), name


def lazily_mapped(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where they are written."""
    memory = mmap.mmap(
        -1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )
    return torch.frombuffer(memory, dtype=dtype)
