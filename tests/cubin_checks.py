"""What every compiled CUDA kernel must be, for the tests that compile them."""

import concurrent.futures
import multiprocessing
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sass import take_apart
from sass_path import instructions_of_a_turn

from shardadam.kernels import cubins

LATENCY = 800e-9  # of a load, in seconds
FUSED = re.compile(r"\b(fma|mad)\.\w*\.?f(32|64)")


def architectures() -> list[str]:
    _, supported = cubins.nvrtc()
    assert {80, 90, 100} <= set(supported)
    return [f"sm_{arch}" for arch in supported if arch in (80, 90) or arch >= 100]


@dataclass(frozen=True, slots=True)
class Job:
    """A variant of a kernel, and how many accesses of 16, 8, 4, 2 and 1 bytes its text has.

    ``loads`` and ``stores`` have those sizes that are counted.
    """

    arch: str
    name: str
    source: str
    defines: dict[str, int]
    loads: dict[int, int]
    stores: dict[int, int]
    counts_instructions: bool = False
    """Whether the number of instructions may limit the kernel and not the memory."""


# 16 and 8 bytes are a stream's, which a hint tells from the loads of coefficients.
_ACCESS = {
    16: r"{}\.E\.EF\.128.*",
    8: r"{}\.E\.EF\.64.*",
    4: r"{}\.E",
    2: r"{}\.E\.[US]16",
    1: r"{}\.E\.[US]8",
}


def fault(job: Job) -> str | None:
    """What is wrong with a variant."""
    cubin, log = cubins.compile_now(job.source, job.arch, job.defines)
    parts = take_apart(cubin)
    spilled = parts.count("(LDL|STL).*")
    wrong = [log] if log.strip() else []
    if parts.local_bytes or spilled:
        wrong.append(f"{parts.local_bytes} bytes of local memory, {spilled} accesses to it")
    for operation, expected in (("LDG", job.loads), ("STG", job.stores)):
        found = {size: parts.count(_ACCESS[size].format(operation)) for size in expected}
        if found != expected:
            wrong.append(f"{operation} by bytes: {found}, expected {expected}")
    loaded, stored = parts.streamed("LDG"), parts.streamed("STG")
    needed = needed_under_way(loaded / (loaded + stored))
    if job.counts_instructions:
        # No more than instructions let it load: 128 of a multiprocessor per clock, at 1.97 GHz.
        turns = 128 * 1.97e9 / instructions_of_a_turn(parts.sass)
        needed = min(needed, turns * loaded * LATENCY)
    if parts.bytes_under_way < needed:
        wrong.append(f"{parts.registers} registers: {parts.bytes_under_way} bytes under way")
    return f"{job.arch} {job.name}: {'; '.join(wrong)}" if wrong else None


def needed_under_way(loads: float) -> float:
    """Bytes under way on a multiprocessor that keep memory busy (Little's law).

    The loads' part of 8 TB/s for 800 ns over 148 multiprocessors (B200, the most demanding).
    """
    return loads * 8e12 * LATENCY / 148


def faults(jobs: Sequence[Job]) -> list[str]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        return [found for found in pool.map(fault, jobs, chunksize=16) if found]


def ptx(source: str, defines: dict[str, int]) -> str:
    """As text, before the assembler expands divisions. (cuda-core asks for a driver first.)"""
    from cuda.bindings import nvrtc

    folder = cubins._SOURCES
    _, program = nvrtc.nvrtcCreateProgram((folder / source).read_bytes(), b"", 0, [], [])
    options = [
        *("-arch=compute_80", "-std=c++17", "--fmad=false", f"-I{folder}"),
        *(f"-D{name}={value}" for name, value in defines.items()),
    ]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    assert not int(result)
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = b" " * size
    nvrtc.nvrtcGetPTX(program, text)
    return text.decode()
