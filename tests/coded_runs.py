"""Runs for the tests of coded state and of stochastically rounded params."""

import itertools

import torch
from torch import Tensor

from kernel_runs import BF16, FP16, FP32, SPECIAL
from shardadam.kernels import Coefficients, Run, reference

BLOCK = 128
# The dtypes of exp_avg and exp_avg_sq.
STATES = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "q16": (torch.int8, torch.int16),
    "q8": (torch.int8, torch.uint8),
}
# The dtypes of param and master.
MASTERS = {
    "fp32 param": (FP32, None),
    "split": (BF16, torch.int16),
    "bf16 and fp32": (BF16, FP32),
    "fp16 and fp32": (FP16, FP32),
    "split8": (BF16, torch.int8),
    "none": (BF16, None),
}
# What adam_cpu.cpp's loops don't do.
BY_BLOCKS = [
    (state, master)
    for state, master in itertools.product(STATES, MASTERS)
    if state != "fp32" or master in ("split8", "none")
]


def zero_run(
    state: str, master: str, grad: Tensor, shared: Coefficients, amsgrad: bool, start: Tensor
) -> Run:
    """A run as at the first step, whose params are ``start`` as well as their format can."""
    numel = len(grad)
    averages, squares = STATES[state]
    coded = state in ("q16", "q8")

    def scale() -> Tensor | None:
        return torch.zeros(-(-numel // BLOCK), dtype=BF16) if coded else None

    param_dtype, master_dtype = MASTERS[master]
    param, kept = start.to(param_dtype), None
    if master_dtype == torch.int16:
        param, kept = reference.split_master(start)
    elif master_dtype == torch.int8:
        param, kept = reference.split8_master(start, torch.full_like(start, 0.0))
    elif master_dtype is not None:
        kept = start.to(param_dtype).float()
    return Run(
        param,
        torch.zeros(numel, dtype=averages),
        torch.zeros(numel, dtype=squares),
        torch.zeros(numel, dtype=squares) if amsgrad else None,
        kept,
        grad,
        shared,
        exp_avg_scale=scale(),
        exp_avg_sq_scale=scale(),
        max_exp_avg_sq_scale=scale() if amsgrad else None,
        first_block=3_000_000_000,
        seed=7,
    )


def gradients(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Of very different sizes, special values and blocks of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-7, 4, (numel,), generator=generator)
    made = torch.randn(numel, generator=generator, dtype=torch.float64) * scale
    chosen = torch.rand(numel, generator=generator) < 0.03
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    which = torch.randint(len(SPECIAL), (numel,), generator=generator)
    made = torch.where(chosen, special[which], made)
    blocks = torch.arange(numel) // BLOCK
    return torch.where(blocks % 5 == 3, 0.0, made).to(dtype)
