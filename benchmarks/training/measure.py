"""What Linux says about this process and its network devices."""

import time
from collections.abc import Callable
from pathlib import Path


class Watch:
    """Wall time and CPU time of all of this process's threads, in ms, lap by lap."""

    def __init__(self) -> None:
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []

    def time(self, function: Callable[[], None]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        self.cpu_ms.append(1e3 * (time.process_time() - cpu))
        self.wall_ms.append(1e3 * (time.perf_counter() - wall))


def peak_rss_bytes() -> int:
    """The most resident memory since the process began, or since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmHWM: this benchmark needs Linux")


def forget_peak() -> None:
    """Begin the peak anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def device_sent_bytes(device: str) -> int:
    """What a network device has transmitted in this process's network namespace, headers too."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == device:
            return int(counters.split()[8])
    raise RuntimeError(f"no network device {device} here")
