"""The CPU twin against torch's fused AdamW: time of one step() on one large param, one run.

python benchmarks/cpu_kernel.py [--numel 50000000] [--threads 1 2] [--repeats 15]
"""

import argparse
from collections.abc import Callable

import torch
from stamp import interleaved, stamp, table

import shardadam

BASELINE = "torch AdamW(fused), fp32"


def main() -> None:
    """Print a table for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=50_000_000, help="elements of the param")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    steps = {
        BASELINE: _step(torch.optim.AdamW, torch.float32, args.numel, fused=True),
        "shardadam AdamW, fp32": _step(shardadam.AdamW, torch.float32, args.numel),
        "shardadam AdamW, bf16 + 16-bit remainder": _step(
            shardadam.AdamW, torch.bfloat16, args.numel
        ),
        "shardadam AdamW, bf16 + fp32 master": _step(
            shardadam.AdamW, torch.bfloat16, args.numel, master="fp32"
        ),
        "shardadam AMSGrad, fp32": _step(shardadam.AdamW, torch.float32, args.numel, amsgrad=True),
        "shardadam NAdam, fp32": _step(shardadam.NAdam, torch.float32, args.numel),
    }
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"\n{args.numel:,} elements, {stamp()}\n")
        print(table(interleaved(steps, args.repeats), BASELINE))


def _step(
    optimizer_class: type[torch.optim.Optimizer], dtype: torch.dtype, numel: int, **options: object
) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(numel, generator=generator).to(dtype))
    param.grad = torch.randn(numel, generator=generator).to(dtype)
    return optimizer_class([param], **options).step


if __name__ == "__main__":
    main()
