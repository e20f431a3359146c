"""What the doctor sees of one machine: versions, the backend, compilers, GPUs, threads."""

import os
import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from shardadam.cli.findings import Finding
from shardadam.cli.summary import size
from shardadam.kernels import backend_for, cpu, cubins

_DRIVER = Path("/proc/driver/nvidia/version")


def device_of(local_rank: int) -> torch.device:
    """Where this rank would train."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def versions() -> dict[str, str]:
    """Of what must be the same on every rank."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["shardadam"] = version("shardadam")
    except PackageNotFoundError:
        found["shardadam"] = "not installed"
    return found


def look_at_versions() -> list[Finding]:
    """Python, torch, shardadam, the system."""
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    return [Finding("versions", "ok", f"{told}, {platform.platform(terse=True)}")]


def look_at_backend(device: torch.device) -> list[Finding]:
    """What will run the update, and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is told here
        try:
            name = backend_for(device).name
        except ValueError as error:
            return [Finding("backend", "wrong", str(error), "train on another GPU, or on the CPU")]
    if "torch operations" not in name:
        return [Finding("backend", "ok", f"{name}: the fastest there is for {device}")]
    advice = "the results are the same and updates are slow; what is missing is named above"
    return [Finding("backend", "warning", name, advice)]


def look_at_twin() -> list[Finding]:
    """The compiled CPU kernel."""
    library, why_not = cpu.load()
    if library is None:
        advice = "install a C++ compiler (Debian: apt install g++), then install shardadam anew"
        return [Finding("CPU kernel", "warning", why_not, advice)]
    return [Finding("CPU kernel", "ok", f"compiled, for {cpu.Twin(library).isa}")]


def look_at_gpu(device: torch.device) -> list[Finding]:
    """GPU, driver and NVRTC."""
    driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else ""
    if device.type != "cuda":
        if not driver:
            return [Finding("GPU", "note", "none: params are updated on the CPU")]
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return [
            Finding(
                "GPU",
                "warning",
                f"there is an NVIDIA driver, but torch ({built}) sees no GPU",
                "install a torch with CUDA"
                if torch.version.cuda is None
                else "see nvidia-smi, "
                "CUDA_VISIBLE_DEVICES, and whether the driver is new enough for this torch",
            )
        ]
    free, total = torch.cuda.mem_get_info(device)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    told = (
        f"{torch.cuda.get_device_name(device)} ({device}), compute capability {capability}, "
        f"{size(free)} of {size(total)} free; {driver or 'driver not known'}"
    )
    if free > total // 2:
        return [Finding("GPU", "ok", told)]
    return [Finding("GPU", "warning", told, "somebody else uses it: see nvidia-smi")]


def look_at_nvrtc(device: torch.device) -> list[Finding]:
    """The compiler of the CUDA kernels, and what it has compiled."""
    needed = device.type == "cuda"
    try:
        number, architectures = cubins.nvrtc()
    except cubins.CompilerMissing as missing:
        if needed:
            what, _, command = str(missing).rpartition(": ")
            return [Finding("NVRTC", "warning", what, command)]
        return [Finding("NVRTC", "note", "not installed; without a GPU it is not needed")]
    newest = architectures[-1]
    findings = [Finding("NVRTC", "ok", f"{number}, compiles up to sm_{newest}")]
    folder = cubins.cache_folder()
    kept = list(folder.glob("*.cubin")) if folder.is_dir() else []
    told = f"{len(kept)} cubins, {size(sum(path.stat().st_size for path in kept))} in {folder}"
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if os.access(nearest, os.W_OK):
        return [*findings, Finding("cubin cache", "ok", told)]
    advice = "kernels are compiled anew in every process; set XDG_CACHE_HOME to a folder of yours"
    return [*findings, Finding("cubin cache", "warning", f"{nearest} can't be written", advice)]


def threads() -> tuple[int, list[int]]:
    """This process's number of threads, and its CPUs: a container or launcher may leave it few."""
    few = hasattr(os, "sched_getaffinity")
    cpus = os.sched_getaffinity(0) if few else range(os.cpu_count() or 1)
    return torch.get_num_threads(), sorted(cpus)


def look_at_threads(ranks: Sequence[tuple[int, Sequence[int]]]) -> list[Finding]:
    """Whether the ranks of one machine, of which each has such `threads`, take each other's CPUs.

    Ranks may share all CPUs, or have some of their own.
    """
    most = max(count for count, _ in ranks)
    fewest = min(len(cpus) for _, cpus in ranks)
    cores = len({cpu for _, cpus in ranks for cpu in cpus})
    told = f"{most} per rank, {cores} CPUs for {len(ranks)} rank{'s' * (len(ranks) != 1)}"
    fits = sum(count for count, _ in ranks) <= cores
    if most == 1 or (fits and all(count <= len(cpus) for count, cpus in ranks)):
        return [Finding("threads", "ok", told)]
    if fewest < cores:
        told += f", {fewest} for one"
    fitting = max(min(cores // len(ranks), fewest), 1)
    advice = f"they wait for each other: set OMP_NUM_THREADS={fitting}"
    return [Finding("threads", "warning", told, advice)]
