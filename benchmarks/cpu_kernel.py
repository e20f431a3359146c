"""The CPU twin against torch's fused AdamW: time of one step() on one large param, one run.

What no optimizer offers yet (coded state) is timed as one call of the kernel.

python benchmarks/cpu_kernel.py [--numel 50000000] [--threads 1 2] [--repeats 15]
    [--only coded] [--cpu-time]
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial

import torch
from stamp import interleaved, stamp, table

import shardadam
from shardadam.kernels import Hyperparameters, Run, backend_for, fold

BASELINE = "torch AdamW(fused), fp32"


def main() -> None:
    """Print a table for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=50_000_000, help="elements of the param")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="words of the names to time beside torch's")
    parser.add_argument("--cpu-time", action="store_true", help="not wall time: on a busy machine")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    makers = {
        BASELINE: partial(_step, torch.optim.AdamW, torch.float32, fused=True),
        "shardadam AdamW, fp32": partial(_step, shardadam.AdamW, torch.float32),
        "shardadam AdamW, bf16 + 16-bit remainder": partial(_step, shardadam.AdamW, torch.bfloat16),
        "shardadam AdamW, bf16 + fp32 master": partial(
            _step, shardadam.AdamW, torch.bfloat16, master="fp32"
        ),
        "shardadam AMSGrad, fp32": partial(_step, shardadam.AdamW, torch.float32, amsgrad=True),
        "shardadam NAdam, fp32": partial(_step, shardadam.NAdam, torch.float32),
        "coded kernel, bf16 + 16-bit remainder, bf16 state": partial(
            _coded, torch.int16, torch.bfloat16, torch.bfloat16
        ),
        "coded kernel, bf16 + 16-bit remainder, q16 (lean)": partial(
            _coded, torch.int16, torch.int8, torch.int16
        ),
        "coded kernel, bf16 + 8-bit remainder, q8 (leanest)": partial(
            _coded, torch.int8, torch.int8, torch.uint8
        ),
        "coded kernel, bf16 alone, q8": partial(_coded, None, torch.int8, torch.uint8),
        "coded kernel, bf16 + 8-bit remainder, fp32 state": partial(
            _coded, torch.int8, torch.float32, torch.float32
        ),
    }
    steps = {
        name: make(args.numel)
        for name, make in makers.items()
        if name == BASELINE or args.only in name
    }
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"\n{args.numel:,} elements, {stamp()}\n")
        print(table(interleaved(steps, args.repeats, clock), BASELINE))


def _step(
    optimizer_class: type[torch.optim.Optimizer], dtype: torch.dtype, numel: int, **options: object
) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(numel, generator=generator).to(dtype))
    param.grad = torch.randn(numel, generator=generator).to(dtype)
    return optimizer_class([param], **options).step


def _coded(
    master: torch.dtype | None, averages: torch.dtype, squares: torch.dtype, numel: int
) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    hyper = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.01, decoupled=True, maximize=False)

    def scale() -> torch.Tensor:
        return torch.zeros(-(-numel // 128), dtype=torch.bfloat16)

    run = Run(
        torch.randn(numel, generator=generator).bfloat16(),
        torch.zeros(numel, dtype=averages),
        torch.zeros(numel, dtype=squares),
        None,
        None if master is None else torch.zeros(numel, dtype=master),
        torch.randn(numel, generator=generator).bfloat16(),
        fold(hyper, 1.0),
        exp_avg_scale=scale(),
        exp_avg_sq_scale=scale(),
    )
    backend = backend_for(torch.device("cpu"))
    steps = itertools.count(1)

    def step() -> None:
        run.coefficients = fold(hyper, float(next(steps)))
        backend.update([run])

    return step


if __name__ == "__main__":
    main()
