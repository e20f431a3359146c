"""Many small params on one process: time of one step(), one run.

python benchmarks/small_params.py [--params 300] [--size 64] [--repeats 50]
"""

import argparse
from collections.abc import Callable

import torch
from stamp import interleaved, stamp, table

import shardadam

BASELINE = "torch AdamW(foreach)"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=int, default=300)
    parser.add_argument("--size", type=int, default=64, help="each param is SIZE x SIZE")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()

    def step(optimizer_class: type[torch.optim.Optimizer], **options: bool) -> Callable[[], object]:
        params = [torch.nn.Parameter(torch.randn(args.size, args.size)) for _ in range(args.params)]
        for param in params:
            param.grad = torch.randn_like(param)
        return optimizer_class(params, **options).step

    steps = {
        BASELINE: step(torch.optim.AdamW, foreach=True),
        "torch AdamW(fused)": step(torch.optim.AdamW, fused=True),
        "shardadam AdamW": step(shardadam.AdamW),
    }
    print(f"\n{args.params} params of {args.size}x{args.size}, {stamp()}\n")
    print(table(interleaved(steps, args.repeats), BASELINE))


if __name__ == "__main__":
    main()
