"""All of AdamW's state to one rank: ours beside torch's ZeroRedundancyOptimizer, one run.

torchrun --standalone --nproc-per-node 2 benchmarks/consolidate.py
"""

import torch
import torch.distributed as dist
from peaks import peak_growth
from stamp import interleaved, stamp, table
from torch.distributed.optim import ZeroRedundancyOptimizer

import shardadam

LAYERS, WIDTH = 28, 1000  # 28 million params: 224 MB of moments


def params() -> list[torch.nn.Parameter]:
    """The same on every rank, with a gradient each."""
    made = [torch.nn.Parameter(torch.full((WIDTH, WIDTH), 0.5)) for _ in range(LAYERS)]
    for param in made:
        param.grad = torch.ones_like(param)
    return made


def main() -> None:
    """Print a table; ZeroRedundancyOptimizer keeps what it gathers, ours returns it."""
    dist.init_process_group("gloo")
    ours = shardadam.AdamW(params())
    theirs = ZeroRedundancyOptimizer(params(), torch.optim.AdamW)
    for optimizer in (ours, theirs):
        optimizer.step()

    def zero_redundancy() -> None:
        dist.barrier()
        theirs.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            theirs.state_dict()

    def sharded() -> None:
        dist.barrier()
        ours.consolidate_state_dict(to=0)

    # First: what a call has allocated and freed, the next one uses again.
    lines = []
    for name, function in (
        ("shardadam", sharded),
        ("torch ZeroRedundancyOptimizer", zero_redundancy),
    ):
        grown = torch.tensor(peak_growth(function))
        peaks = [torch.empty_like(grown) for _ in range(dist.get_world_size())]
        dist.all_gather(peaks, grown)
        lines.append(f"{name}: {', '.join(f'{p:.0f}' for p in peaks)} MiB more at the ranks' peaks")

    seconds = interleaved(
        {"torch ZeroRedundancyOptimizer": zero_redundancy, "shardadam": sharded}, repeats=9
    )
    if dist.get_rank() == 0:
        held = sum(value.nbytes for entry in ours.state.values() for value in entry.values())
        print(
            f"\n{8 * LAYERS * WIDTH**2 / 1e6:.0f} MB of state to one of {dist.get_world_size()} "
            f"gloo ranks ({held / 1e6:.0f} MB there before), {stamp()}\n"
        )
        print(table(seconds, baseline="torch ZeroRedundancyOptimizer"))
        print("", *lines, sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
