"""The CUDA backend with its kernels compiled for, and launched on, the CPU (cuda_on_cpu/)."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

import shardadam
from shardadam.kernels.cuda import Cuda

_SHIM = Path(__file__).with_name("cuda_on_cpu")
_CSRC = Path(shardadam.__file__).with_name("csrc")

# The kernels that update: the file that has them, its entry point, the numbers of a variant.
_UPDATES = {
    "shardadam_update": ("kernels.cpp", "update", ("PARAM", "GRAD", "FLAGS")),
    "shardadam_update_blocks": (
        *("coded_kernels.cpp", "update_blocks"),
        ("PARAM", "STATE", "GRAD", "FLAGS"),
    ),
}


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """A file of cuda_on_cpu/, compiled."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    options = [
        *("-std=c++17", "-ffp-contract=off", "-fno-math-errno"),
        # The coded kernel has 360 variants: half a minute to compile, with -O2 half as much again.
        "-O1" if source == "coded_kernels.cpp" else "-O2",
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"),
        *("-I", str(_CSRC), "-include", str(_SHIM / "shim.h"), str(_SHIM / source)),
        *shlex.split(os.environ.get("CXXFLAGS", "")),  # `make sanitize` gives some
    ]
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/kernels.so"
        subprocess.run([compiler, *options, "-o", built], check=True)
        return ctypes.CDLL(built)


class ShimmedKernels:
    """`Kernels` for CPU tensors. ``grid``: blocks and threads of a launch instead of the usual."""

    device = torch.device("cpu")
    arch, compiler, multiprocessors = "sm_00", "shim", 1

    def __init__(self) -> None:
        self.library = library("kernels.cpp")
        self.grid: tuple[int, int] | None = None
        self.blocks: range | None = None
        self.launched: list[str] = []
        self._loaded: dict = {}

    def get(self, source, name, defines):
        return self._loaded.setdefault((name, *defines.items()), (name, defines))

    def launch(self, launches):
        for launch in launches:
            self._launch(*launch)

    def _launch(self, kernel, blocks, threads, arguments):
        name, defines = kernel
        self.launched.append(name)
        if self.grid is not None and name in _UPDATES:
            blocks, threads = self.grid
        first, *rest = arguments
        address = ctypes.c_void_p(ctypes.addressof(first))
        if name in _UPDATES:
            source, entry, keys = _UPDATES[name]
            codes = (defines[f"SHARDADAM_{key}"] for key in keys)
            chosen = self.blocks or range(blocks)
            failed = getattr(library(source), entry)(
                *map(ctypes.c_int32, codes),
                address,
                ctypes.c_int64(chosen.start),
                ctypes.c_int64(chosen.stop),
                *(ctypes.c_uint32(blocks), ctypes.c_uint32(threads)),
            )
            assert not failed, defines
        elif name == "shardadam_sum_squares":
            self.library.sum(defines["SHARDADAM_GRAD"], address, *rest, ctypes.c_uint32(blocks))
        elif name == "shardadam_root":
            self.library.root(first, *rest)
        else:
            assert name == "shardadam_advance"
            self.library.advance(address, ctypes.c_uint32(blocks), ctypes.c_uint32(threads))


def shimmed_cuda() -> tuple[Cuda, ShimmedKernels]:
    """The backend, and what it launches on."""
    kernels = ShimmedKernels()
    return Cuda(kernels), kernels
