"""A step with its state in a file, beside one with its state in memory.

python benchmarks/offload.py [--directory /where/the/disk/is] [--numel 50000000] [--threads 2]
    [--params 300] [--forms lean] [--ways memory file disk]

Under a memory limit, which ``--ways`` fit can be seen: in a cgroup, or by
systemd-run --scope -p MemoryMax=1200M python benchmarks/offload.py --forms full --ways file
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stamp import stamp, table

import shardadam

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32 params, 8 bytes of state per param", {}),
    "full": ("bf16 params, 10 bytes", {"memory": "full"}),
    "lean": ("bf16 params, 5.03 bytes", {"memory": "lean"}),
    "leanest": ("bf16 params, 3.03 bytes", {"memory": "leanest"}),
}
WAYS = {
    "memory": "in memory",
    "file": "in a file, which is in the page cache if there is room",
    "disk": "in a file, which is read from the disk",
}


def main() -> None:
    """Print a table for each format of the state."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--numel", type=int, default=50_000_000, help="elements of all params")
    parser.add_argument("--params", type=int, default=1, help="of as many elements each")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["fp32", "lean", "leanest"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"a step on {args.numel:,} elements, {stamp()}")
    for form in args.forms:
        name, options = FORMS[form]
        print(f"\n{name}\n")
        sizes = [args.numel // args.params] * args.params
        measure(options, args.ways, args.directory, sizes, args.repeats)


def measure(
    options: dict[str, Any], ways: Sequence[str], directory: Path, sizes: list[int], repeats: int
) -> None:
    """One format, the ways taking turns."""
    optimizers = {
        way: _optimizer(sizes, None if way == "memory" else directory, options) for way in ways
    }
    wall: dict[str, list[float]] = {WAYS[way]: [] for way in ways}
    cpu: dict[str, list[float]] = {WAYS[way]: [] for way in ways}
    for optimizer in optimizers.values():
        for _ in range(2):  # the first step on a file allocates its pages
            optimizer.step()
    for _ in range(repeats):
        for way, optimizer in optimizers.items():
            if way == "disk":
                drop(optimizer)
            start, used = time.perf_counter(), time.process_time()
            optimizer.step()
            wall[WAYS[way]].append(time.perf_counter() - start)
            cpu[WAYS[way]].append(time.process_time() - used)
    print(table(wall, WAYS[ways[0]]))
    times = (f"{1e3 * statistics.median(values):.0f} {name}" for name, values in cpu.items())
    print(f"\nCPU-ms: {'; '.join(times)}")


def drop(optimizer: torch.optim.Optimizer) -> None:
    """Have the state on the disk alone."""
    fd = optimizer._memory._fd  # type: ignore[attr-defined]
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _optimizer(
    sizes: list[int], directory: Path | None, options: dict[str, Any]
) -> shardadam.AdamW:
    dtype = torch.bfloat16 if options else torch.float32
    params = [torch.nn.Parameter(torch.empty(size, dtype=dtype).normal_()) for size in sizes]
    optimizer = shardadam.AdamW(params, offload=directory, **options)
    for param in params:
        param.grad = torch.empty_like(param).normal_()
    return optimizer


if __name__ == "__main__":
    main()
