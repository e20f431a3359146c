"""Many small params: time of one step(), one run.

python benchmarks/small_params.py [--params 300] [--size 64] [--repeats 50]
torchrun --standalone --nproc-per-node 2 benchmarks/small_params.py     # as FSDP2's DTensors
"""

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from stamp import interleaved, stamp, table
from torch import nn

import shardadam


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=int, default=300)
    parser.add_argument("--size", type=int, default=64, help="each param is SIZE x SIZE")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    of_fsdp2 = "WORLD_SIZE" in os.environ
    if of_fsdp2:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)

    def step(optimizer_class: type[torch.optim.Optimizer], **options: bool) -> Callable[[], object]:
        params = _fsdp2_params(args) if of_fsdp2 else _plain_params(args)
        return optimizer_class(params, **options).step

    baseline = "torch AdamW(fused)" if of_fsdp2 else "torch AdamW(foreach)"
    steps = {
        "torch AdamW(foreach)": step(torch.optim.AdamW, foreach=True),
        "torch AdamW(fused)": step(torch.optim.AdamW, fused=True),
        "shardadam AdamW": step(shardadam.AdamW),
    }
    measured = table(
        interleaved(steps, args.repeats, before=dist.barrier if of_fsdp2 else lambda: None),
        baseline,
    )
    if not of_fsdp2 or dist.get_rank() == 0:
        kind = f"of FSDP2 on {dist.get_world_size()} ranks" if of_fsdp2 else "on one process"
        print(f"\n{args.params} params of {args.size}x{args.size} {kind}, {stamp()}\n")
        print(measured)
    if of_fsdp2:
        dist.destroy_process_group()


def _plain_params(args: argparse.Namespace) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(args.size, args.size)) for _ in range(args.params)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def _fsdp2_params(args: argparse.Namespace) -> list[nn.Parameter]:
    """With the gradients that a backward pass has left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = [nn.Linear(args.size, args.size, bias=False) for _ in range(args.params)]
    model = fully_shard(
        nn.Sequential(*layers), mesh=init_device_mesh("cpu", (dist.get_world_size(),))
    )
    model(torch.randn(8, args.size)).square().mean().backward()
    return list(model.parameters())


if __name__ == "__main__":
    main()
