"""What a check of a GPU has found: verdicts, numbers and the machine, kept as JSON."""

import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from stamp import stamp

from shardadam.kernels import backend_for, cubins


class Clock:
    """How long a section may go on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when over."""
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Verdict:
    """``status`` (PASS, FAIL or SKIP) of one claim."""

    status: str
    claim: str
    detail: str

    def __str__(self) -> str:
        joint = " because " if self.status == "SKIP" else ": "
        return f"{self.status}  {self.claim}{joint}{self.detail}"


@dataclass
class Report:
    """Printed as it grows, and written after every section: a later crash takes nothing away."""

    file: Path
    environment: dict[str, Any]
    verdicts: list[Verdict] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def judge(self, good: bool, claim: str, detail: str) -> None:
        """PASS or FAIL."""
        self._add(Verdict("PASS" if good else "FAIL", claim, detail))

    def skip(self, claim: str, reason: str) -> None:
        """Nothing can be said."""
        self._add(Verdict("SKIP", claim, reason))

    def _add(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        print(verdict, flush=True)

    @property
    def failed(self) -> bool:
        """Whether any claim did not hold."""
        return any(verdict.status == "FAIL" for verdict in self.verdicts)

    def write(self) -> None:
        """Write everything found so far."""
        content = {
            "environment": self.environment,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "numbers": self.numbers,
        }
        self.file.write_text(json.dumps(content, indent=1) + "\n")


def environment(device: torch.device) -> dict[str, Any]:
    """The GPU, and the versions of all that has a say."""
    properties = torch.cuda.get_device_properties(device)
    try:
        nvrtc, _ = cubins.nvrtc()
    except cubins.CompilerMissing as missing:
        nvrtc = str(missing)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(device),
        "gpus": torch.cuda.device_count(),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvrtc": nvrtc,
        "python": platform.python_version(),
        "kernel": backend_for(device).name,
        "cpu_kernel": backend_for(torch.device("cpu")).name,
        "stamp": stamp(),  # with the commit
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        version = Path("/proc/driver/nvidia/version")
        return version.read_text().splitlines()[0] if version.exists() else "unknown"


def l2_bytes(device: torch.device) -> int:
    """The size of the L2 cache."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated, after what nobody uses any more was given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def listed(items: Sequence[str], most: int = 6) -> str:
    """The first few of many."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more
