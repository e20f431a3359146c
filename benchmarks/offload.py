"""A step with its state in a file, beside one with its state in memory.

python benchmarks/offload.py --directory /where/the/disk/is
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stamp import stamp, table

import shardadam

MEMORY = "in memory"
FORMS: dict[str, dict[str, Any]] = {
    "fp32 params, fp32 state (8 bytes per param)": {},
    "bf16 params, lean (5.03)": {"memory": "lean"},
    "bf16 params, leanest (3.03)": {"memory": "leanest"},
}


def main() -> None:
    """Print a table for each format of the state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"a step on {args.numel:,} params, {stamp()}")
    for name, options in FORMS.items():
        print(f"\n{name}\n")
        measure(options, args.directory, args.numel, args.repeats)


def measure(options: dict[str, Any], directory: Path, numel: int, repeats: int) -> None:
    """One format: in memory, from the page cache, and from the disk."""
    held, kept, read = (
        _optimizer(numel, folder, options) for folder in (None, directory, directory)
    )
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        MEMORY: (lambda: None, held.step),
        "in a file, which is in the page cache": (lambda: None, kept.step),
        "in a file, which is read from the disk": (lambda: drop(read), read.step),
    }
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for optimizer in (held, kept, read, kept, read):  # the first step on a file allocates its pages
        optimizer.step()
    for _ in range(repeats):
        for name, (before, step) in ways.items():
            before()
            start, used = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    print(table(wall, MEMORY))
    times = (f"{1e3 * statistics.median(values):.0f} {name}" for name, values in cpu.items())
    print(f"\nCPU-ms: {', '.join(times)}")


def drop(optimizer: torch.optim.Optimizer) -> None:
    """Have the state on the disk alone."""
    fd = optimizer._memory._fd  # type: ignore[attr-defined]
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _optimizer(numel: int, directory: Path | None, options: dict[str, Any]) -> shardadam.AdamW:
    dtype = torch.bfloat16 if options else torch.float32
    param = torch.nn.Parameter(torch.randn(numel).to(dtype))
    param.grad = torch.randn(numel).to(dtype)
    return shardadam.AdamW([param], offload=directory, **options)


if __name__ == "__main__":
    main()
