"""Saving and loading, against torch.distributed.checkpoint with the same bytes, in one run.

torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint.py [--params 32] [--repeats 5]

Both sync what they write; both read from the page cache. Ours also digests all bytes, and at
loading verifies them and gathers the params; torch's DTensors stay shards and are not verified.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peaks import peak_growth
from stamp import stamp, table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shardadam
from shardadam import checkpoint

THEIRS, OURS = "torch.distributed.checkpoint", "shardadam.checkpoint"


def main() -> None:
    """Print a table for saving and one for loading."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=int, default=32, help="of 1024x1024 in fp32, each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to save; default: the temporary one")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folders: list[str | None] = [tempfile.mkdtemp(dir=args.folder) if rank == 0 else None]
    dist.broadcast_object_list(folders)
    root = Path(str(folders[0]))
    mesh = init_device_mesh("cpu", (world_size,))
    params = [torch.nn.Parameter(torch.randn(1024, 1024)) for _ in range(args.params)]
    optimizer = shardadam.AdamW(params)
    numel = 1024 * 1024 // world_size
    state = {
        f"{part} {index}": DTensor.from_local(torch.randn(numel), mesh, [Shard(0)])
        for index in range(args.params)
        for part in ("values", "exp_avg", "exp_avg_sq")
    }
    actions: dict[str, dict[str, Callable[[], object]]] = {
        "saving": {
            THEIRS: lambda: dcp.save(state, checkpoint_id=root / "theirs"),
            OURS: lambda: checkpoint.save(root / "ours", step=1, optimizer=optimizer, rng=False),
        },
        "loading": {
            THEIRS: lambda: dcp.load(state, checkpoint_id=root / "theirs"),
            OURS: lambda: checkpoint.load(root / "ours", optimizer=optimizer, rng=False),
        },
    }
    try:
        for doing, functions in actions.items():
            seconds: dict[str, list[float]] = {name: [] for name in functions}
            peaks: dict[str, list[float]] = {name: [] for name in functions}
            for repeat in range(args.repeats + 1):
                for name, function in functions.items():
                    if doing == "saving" and rank == 0:
                        shutil.rmtree(root / ("ours" if name == OURS else "theirs"), True)
                        os.sync()
                    second, peak = measure(function)
                    peaks[name].append(peak)
                    if repeat:  # the first one warms up: what it has allocated is used again
                        seconds[name].append(second)
            if rank == 0:
                size = args.params * 12
                print(f"\n{doing} {size} MiB on {world_size} ranks, {stamp()}\n")
                print(table(seconds, THEIRS))
                for name, values in peaks.items():
                    print(f"\n{name}: {max(values):.0f} MiB more at the peak of a rank")
    finally:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(root)
    dist.destroy_process_group()


def measure(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds until all ranks are through, and the most MiB that a rank's memory has grown by."""
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        dist.barrier()
        start = time.perf_counter()
        function()
        dist.barrier()
        seconds = time.perf_counter() - start

    grown = torch.tensor(peak_growth(timed))
    dist.all_reduce(grown, op=dist.ReduceOp.MAX)
    return seconds, grown.item()


if __name__ == "__main__":
    main()
