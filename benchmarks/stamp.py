"""What a figure needs beside it: machine, versions, commit; and interleaved timing."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import shardadam


def stamp() -> str:
    """One line that says where and with what the figures were made."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return (
        f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores; "
        f"torch {torch.__version__}, shardadam {shardadam.__version__} ({commit or 'no commit'}), "
        f"Python {platform.python_version()}"
    )


def interleaved(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns so that noise hits all alike.

    ``before`` is called before each: a barrier, so that none waits for another's rank.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            before()
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def table(seconds: dict[str, list[float]], baseline: str) -> str:
    """Median and quartiles in ms, and the speed relative to ``baseline`` (more is faster)."""
    lines = [
        "| | median ms | quartiles | speed |",
        "|---|---|---|---|",
    ]
    reference = statistics.median(seconds[baseline])
    for name, values in seconds.items():
        low, middle, high = (1e3 * value for value in statistics.quantiles(values, n=4))
        speed = reference / statistics.median(values)
        lines.append(f"| {name} | {middle:.2f} | {low:.2f}-{high:.2f} | {speed:.2f}x |")
    return "\n".join(lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
