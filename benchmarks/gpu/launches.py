"""What a step costs the CPU: per launch, eager and as the replay of a CUDA graph."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import shardadam
from gpu.graph import capture
from gpu.report import Clock, Report, quartiles
from shardadam.kernels.cuda_driver import Launch

CLAIM_LAUNCH = "≤ 12 µs of CPU time for a kernel launch"
CLAIM_STEP = "≤ 12 µs of CPU time of step() per launch with 300 buckets"
MOST_US = 12.0
PARAMS, SIZE = 300, 64
BUCKETS = {1: 32 << 20, 10: 30 * 4 * SIZE * SIZE, 300: 4 * SIZE * SIZE}
"""The number of buckets, and the bytes of a bucket that make it so."""
REPEATS = 50


def check(report: Report, device: torch.device, clock: Clock, quick: bool) -> None:
    """Time everything, then judge."""
    found: dict[str, Any] = {}
    report.numbers["launches"] = found
    for buckets, size in BUCKETS.items():
        optimizer = _optimizer(shardadam.AdamW, device, bucket_bytes=size)
        optimizer.step()
        launches = _launches(optimizer)
        found[f"shardadam, {buckets} buckets"] = {
            "launches": len(launches),
            "step_us": quartiles(_host_us(optimizer.step, device)),
            **_replay_us(optimizer.step, device),
        }
    launch, bare = optimizer._backend._kernels.launch, launches[-1]
    found["launch_us"] = quartiles(_host_us(lambda: launch([bare]), device, 4 * REPEATS))
    fused = _optimizer(torch.optim.AdamW, device, fused=True)
    capturable = _optimizer(torch.optim.AdamW, device, fused=True, capturable=True)
    found["torch AdamW(fused)"] = {
        "step_us": quartiles(_host_us(fused.step, device)),
        **_replay_us(capturable.step, device),
    }
    judge(report, found)


def judge(report: Report, found: dict[str, Any]) -> None:
    """The verdicts that follow from the numbers."""
    low, middle, high = found["launch_us"]
    report.judge(middle <= MOST_US, CLAIM_LAUNCH, f"{middle:.1f} µs ({low:.1f} to {high:.1f})")
    parts, shares = [], []
    for name, numbers in found.items():
        if name == "launch_us":
            continue
        part = f"{name}: {numbers['step_us'][1]:.0f} µs"
        if "launches" in numbers:
            shares.append(numbers["step_us"][1] / numbers["launches"])
            part += f" for {numbers['launches']} launches, {shares[-1]:.1f} µs each"
        replay = numbers["replay_us"]
        parts.append(f"{part}; replay {replay[1]:.0f} µs, on the device {numbers['gpu_us'][1]:.0f}")
    report.judge(shares[-1] <= MOST_US, CLAIM_STEP, f"{shares[-1]:.1f} µs. {'. '.join(parts)}")


def _optimizer(optimizer_class: type[Any], device: torch.device, **options: object) -> Any:
    params = [nn.Parameter(torch.randn(SIZE, SIZE, device=device)) for _ in range(PARAMS)]
    for param in params:
        param.grad = torch.randn_like(param)
    return optimizer_class(params, **options)


def _launches(optimizer: Any) -> list[Launch]:
    """Every launch of a step, which does happen."""
    kernels = optimizer._backend._kernels
    seen: list[Launch] = []
    launch = kernels.launch

    def watched(launches: Sequence[Launch]) -> None:
        seen.extend(launches)
        launch(launches)

    kernels.launch = watched
    try:
        optimizer.step()
    finally:
        del kernels.launch
    return seen


def _host_us(
    function: Callable[[], object], device: torch.device, repeats: int = REPEATS
) -> list[float]:
    """Microseconds until each call returns; the device is idle when it is made."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize(device)
    return times[3:]


def _replay_us(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Of a captured step: the CPU's time of a replay, and the device's."""
    graph = capture(step)
    host = _host_us(graph.replay, device)
    events = []
    for _ in range(REPEATS):
        torch.cuda._sleep(1_000_000)  # the host gets ahead
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    device_us = [1e3 * start.elapsed_time(end) for start, end in events]
    return {"replay_us": quartiles(host), "gpu_us": quartiles(device_us)}
