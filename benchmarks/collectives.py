"""Our reduce-scatter and all-gather against torch.distributed's own, on the same 64 MiB, one run.

torchrun --standalone --nproc-per-node 2 benchmarks/collectives.py
"""

import torch
import torch.distributed as dist
from stamp import interleaved, stamp, table

from shardadam.collectives import Communicator
from shardadam.kernels import backend_for

NUMEL = 1 << 24
# Renamed in torch 2.13.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def main() -> None:
    """Print a table for each of the two exchanges."""
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    device = torch.device("cpu")
    ours = Communicator(None, device, backend_for(device).mean)
    flat, mean = torch.randn(NUMEL), torch.empty(NUMEL // world_size)
    shard = flat.view(world_size, -1)[dist.get_rank()].clone()
    exchanges = {
        "reduce-scatter": {
            "torch reduce_scatter_single": lambda: reduce_scatter(mean, flat),
            "torch all_reduce": lambda: dist.all_reduce(flat),
            "shardadam": lambda: ours.start_reduce_scatter_mean(flat, mean).wait(),
        },
        "all-gather": {
            "torch all_gather_single": lambda: all_gather(flat, shard),
            "shardadam": lambda: ours.all_gather([flat]),
        },
    }
    for name, functions in exchanges.items():
        seconds = interleaved(functions, repeats=15)
        if dist.get_rank() == 0:
            print(f"\n{name} of 64 MiB of fp32 on {world_size} gloo ranks, {stamp()}\n")
            print(table(seconds, baseline=next(iter(functions))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
