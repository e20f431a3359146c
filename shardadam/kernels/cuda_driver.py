"""CUDA kernels of one device: compiled or found, loaded once in a process, launched."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardadam.kernels import cubins

OLDEST = (7, 0)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel: ``function`` is what cuda-bindings launches, ``owner`` keeps it loaded."""

    function: Any
    owner: Any


# A kernel, blocks, threads and arguments: structs and pointers of ctypes.
Launch = tuple[Kernel, int, int, tuple[Any, ...]]


class Kernels:
    """The kernels for ``device``, loaded on first use and shared by all optimizers on it."""

    def __init__(self, device: torch.device, arch: str, compiler: str) -> None:
        self.device = device
        self.arch = arch
        self.compiler = compiler
        self._loaded: dict[tuple[Any, ...], Kernel] = {}

    def get(self, source: str, name: str, defines: Mapping[str, int]) -> Kernel:
        """The kernel ``name`` of ``csrc/<source>``, compiled with ``defines``.

        Raises:
            RuntimeError: it would have to be loaded while a CUDA graph is captured.
        """
        key = (source, name, *defines.items())
        kernel = self._loaded.get(key)
        if kernel is None:
            from cuda.bindings import driver
            from cuda.core import ObjectCode

            with torch.cuda.device(self.device):
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "a kernel has to be compiled and loaded, which can't be done while a CUDA "
                        "graph is captured: expected a step() before, with gradients for the same "
                        "params"
                    )
                self._enter_context()
                cubin = cubins.compiled(source, self.arch, defines)
                owner = ObjectCode.from_cubin(cubin).get_kernel(name)
            kernel = self._loaded[key] = Kernel(driver.CUfunction(int(owner.handle)), owner)
        return kernel

    def launch(self, launches: Sequence[Launch]) -> None:
        """Launch on torch's current stream. By cuda-bindings: cuda-core takes no structs."""
        from cuda.bindings import driver

        with torch.cuda.device(self.device):
            self._enter_context()
            stream = torch.cuda.current_stream(self.device).cuda_stream
            for kernel, blocks, threads, arguments in launches:
                addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
                grid, block = (blocks, 1, 1), (threads, 1, 1)
                (result,) = driver.cuLaunchKernel(
                    kernel.function, *grid, *block, 0, stream, ctypes.addressof(addresses), 0
                )
                if int(result):
                    raise RuntimeError(f"launching a CUDA kernel failed: {result}")

    def _enter_context(self) -> None:
        """Make the device's context this thread's, if it has none.

        torch does so with a thread's first operation of its own, which this may precede.
        """
        from cuda.bindings import driver

        _, context = driver.cuCtxGetCurrent()
        if not int(context):
            _, primary = driver.cuDevicePrimaryCtxRetain(self.device.index)
            driver.cuCtxSetCurrent(primary)

    @property
    def multiprocessors(self) -> int:
        """How many the device has."""
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)


_kernels: dict[torch.device, tuple[Kernels | None, str]] = {}


def load(device: torch.device) -> tuple[Kernels | None, str]:
    """The kernels for ``device``, which has an index, or None and a short reason.

    Raises:
        ValueError: a GPU that is older than what they are written for.
    """
    if device not in _kernels:
        _kernels[device] = _load(device)
    return _kernels[device]


def _load(device: torch.device) -> tuple[Kernels | None, str]:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}: expected {OLDEST[0]}.{OLDEST[1]} or newer"
        )
    try:
        version, supported = cubins.nvrtc()
    except cubins.CompilerMissing as missing:
        return None, str(missing)
    arch = cubins.architecture(capability, supported)
    if arch is None:
        return None, (
            f"NVRTC {version} does not compile for compute capability "
            f"{capability[0]}.{capability[1]}: another nvidia-cuda-nvrtc is needed"
        )
    kernels = Kernels(device, arch, version)
    try:  # does the driver take what this compiler makes?
        kernels.get("coefficients_cuda.cu", "shardadam_advance", {})
    except Exception as error:  # what cuda-core raises has no common base
        return None, f"a kernel that NVRTC {version} compiled could not be loaded: {error}"
    return kernels, ""
