"""Windows of params on a GPU, whose state is in the host's memory and updated there.

Gradients and params come down into a slot in pinned memory, updated params go up. Each slot has a
stream of its own, beside the current one: so one slot's copies go on while another's window is
updated, and both directions of the link are in use. Its thread waits for the copies; what the
optimizer's thread then launches comes after them.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from shardadam import slots
from shardadam.buffers import FlatBucket
from shardadam.kernels import Run
from shardadam.kernels.run import in_memory_order, state_dtype
from shardadam.layout import ALIGNMENT
from shardadam.slots import Window


class HostSlot:
    """Memory for the params and gradients of one window, whose state is where it is: a `Slot`.

    Args:
        device: of the params. On the CPU, for tests, copies are plain ones.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._memory = torch.empty(slots.SLOT_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """As in `Slot`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def capacity(self, bucket: FlatBucket) -> int:
        """As in `Slot`."""
        nbytes = bucket.dtype.itemsize + state_dtype(bucket.dtype).itemsize
        return slots.SLOT_BYTES // nbytes // ALIGNMENT * ALIGNMENT

    def stage(self, bucket: FlatBucket, origin: int, run: Run, start: int, stop: int) -> Run:
        """As in `Slot`."""
        params = self._view(0, self.capacity(bucket), bucket.dtype)
        here = bucket.first_of(run) - origin
        return bucket.part_of_run(run, start, stop, param=params[here + start : here + stop])

    def grad(self, bucket: FlatBucket, origin: int, run: Run, start: int, stop: int) -> Tensor:
        """As in `Slot`; of the dtype that it has on the device."""
        numel = self.capacity(bucket)
        grads = self._view(numel * bucket.dtype.itemsize, numel, run.grad.dtype)
        here = bucket.first_of(run) - origin
        return grads[here + start : here + stop]

    def fetch(self, window: Window) -> None:
        """As in `Slot`."""
        with self._copying():
            for part in window.parts:
                elements = slice(part.start, part.stop)
                grad = in_memory_order(part.run.grad)[elements]
                part.staged.grad.copy_(grad, non_blocking=True)
                part.staged.param.copy_(part.run.param[elements], non_blocking=True)

    def put(self, window: Window) -> None:
        """As in `Slot`."""
        with self._copying():
            for part in window.parts:
                target = part.run.param[part.start : part.stop]
                target.copy_(part.staged.param, non_blocking=True)

    def _view(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        return self._memory[offset : offset + numel * dtype.itemsize].view(dtype)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
