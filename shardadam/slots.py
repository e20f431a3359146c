"""What a slot is, and a window that goes through it: see [Note: windows]."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.kernels import Run

SLOT_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """Elements ``[start, stop)`` of ``run``, to be updated as the run ``staged``."""

    run: Run
    start: int
    stop: int
    staged: Run


@dataclass(frozen=True, slots=True)
class Window:
    """Elements ``[start, stop)`` of a bucket's shard, and the parts of runs in them."""

    bucket: FlatBucket
    start: int
    stop: int
    parts: list[Part]


class Slot(Protocol):
    """Memory for one window. `fetch` and `put` are called in the slot's thread."""

    def capacity(self, bucket: FlatBucket) -> int:
        """How many elements of ``bucket`` a window has, a multiple of ALIGNMENT."""

    def begin(self) -> None:
        """All gradients are there, or on their way in what is the device's current stream now."""

    def stage(self, bucket: FlatBucket, origin: int, run: Run, start: int, stop: int) -> Run:
        """The run that updates elements ``[start, stop)`` of ``run`` in a window at ``origin``.

        Called once, but for its gradient and coefficients, which are of one step.
        """

    def grad(self, bucket: FlatBucket, origin: int, run: Run, start: int, stop: int) -> Tensor:
        """Where that run is to read its gradient."""

    def fetch(self, window: Window) -> None:
        """Bring in what the staged runs of ``window`` read."""

    def put(self, window: Window) -> None:
        """Bring back what they wrote."""
