"""Windows of state that lives in a file: read into a slot, written back from it."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam import slots
from shardadam.buffers import FlatBucket
from shardadam.kernels import Run
from shardadam.kernels.run import in_memory_order
from shardadam.kernels.state_formats import is_scale, part_of
from shardadam.layout import ALIGNMENT
from shardadam.slots import Window
from shardadam.state_file import StateFile


class FileSlot:
    """Memory for the state of one window, whose params and gradients are where they are: a `Slot`.

    Args:
        file: where all buckets' state is.
    """

    def __init__(self, file: StateFile) -> None:
        self._file = file
        self._memory = mmap.mmap(-1, slots.SLOT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._layouts: dict[tuple[FlatBucket, int], _Layout] = {}

    def begin(self) -> None:
        """Nothing: there is no device."""

    def capacity(self, bucket: FlatBucket) -> int:
        """As in `Slot`."""
        return self._layout(bucket).numel

    def stage(self, bucket: FlatBucket, origin: int, run: Run, start: int, stop: int) -> Run:
        """As in `Slot`."""
        return bucket.part_of_run(run, start, stop, state=self._state(bucket), origin=origin)

    def grad(self, bucket: FlatBucket, origin: int, run: Run, start: int, stop: int) -> Tensor:
        """As in `Slot`."""
        whole = stop - start == run.param.numel()
        return run.grad if whole else in_memory_order(run.grad)[start:stop]

    def fetch(self, window: Window) -> None:
        """As in `Slot`."""
        self._copy(window, self._file.read)

    def put(self, window: Window) -> None:
        """As in `Slot`."""
        self._copy(window, self._file.write)

    def _copy(self, window: Window, copy: Callable[[int, memoryview], None]) -> None:
        places = self._layout(window.bucket).places
        with memoryview(self._memory) as memory:
            for name, tensor in window.bucket.state.items():
                part, size = part_of(name, window.start, window.stop), tensor.itemsize
                place, nbytes = places[name], (part.stop - part.start) * size
                offset = self._file.offset(tensor) + part.start * size
                copy(offset, memory[place : place + nbytes])

    def _layout(self, bucket: FlatBucket) -> "_Layout":
        key = bucket, len(bucket.state)  # AMSGrad may be switched on
        if key not in self._layouts:
            self._layouts[key] = _layout_of(bucket)
        return self._layouts[key]

    def _state(self, bucket: FlatBucket) -> dict[str, Tensor]:
        """The state of a window, in the slot."""
        layout = self._layout(bucket)
        return {
            name: torch.frombuffer(
                self._memory,
                dtype=tensor.dtype,
                count=part_of(name, 0, layout.numel).stop,
                offset=layout.places[name],
            )
            for name, tensor in bucket.state.items()
        }


@dataclass(frozen=True, slots=True)
class _Layout:
    """Elements of a window, and where in the slot each tensor of their state begins, in bytes."""

    numel: int
    places: dict[str, int]


def _layout_of(bucket: FlatBucket) -> _Layout:
    per_block = {
        name: tensor.itemsize * (1 if is_scale(name) else ALIGNMENT)
        for name, tensor in bucket.state.items()
    }
    # Every tensor begins a page, so that copies are of aligned memory.
    blocks = (slots.SLOT_BYTES - mmap.PAGESIZE * len(per_block)) // sum(per_block.values())
    assert blocks > 0, "a slot has room for a block of any state"
    places, place = {}, 0
    for name, nbytes in per_block.items():
        places[name] = place
        place += -(-blocks * nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    return _Layout(blocks * ALIGNMENT, places)
