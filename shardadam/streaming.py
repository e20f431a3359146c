"""Updates of state that lives in a file: read ahead, updated, written behind.

[Note: windows]

A bucket's shard is updated window by window: a window has as many elements as have room for their
state in a *slot*, memory of a fixed size that is used again and again. Each slot goes round:

    slot 0   | update 0 | write 0, read 3      | update 3 | write 3, read 6 …
    slot 1   |          | update 1 | write 1, read 4      | update 4 | …
    slot 2   |                     | update 2 | write 2, read 5      | update 5 …

The updates are made one after the other by the kernel's threads, writes and reads by threads of
their own. So what a step needs in memory is the slots, however large a model or one param of it is.
Windows begin at multiples of ALIGNMENT, so that blocks of coded state are never cut, and the kernel
gives the same bits wherever a run is cut.

A disk that fails must not leave other ranks waiting: the error is kept, nothing more is updated,
and this rank goes through the rest of the step like the others, until all meet and raise.
"""

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.kernels import Backend, Run
from shardadam.kernels.run import in_memory_order
from shardadam.kernels.state_formats import is_scale, part_of
from shardadam.layout import ALIGNMENT
from shardadam.state_file import StateFile
from shardadam.updates import Update

SLOTS = 3
SLOT_BYTES = 8 * 2**20


class Slot:
    """Memory for one window's state; ``ready``: what is being read into it."""

    def __init__(self, index: int, nbytes: int) -> None:
        self.index = index
        self.memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.ready: Future[None] | None = None


@dataclass(frozen=True, slots=True)
class _Copied:
    """Bytes of a window: where they are in the file, and in a slot."""

    file: int
    slot: int
    nbytes: int


class _Windows:
    """How a bucket's shard is cut into windows, and where their state is in a slot."""

    def __init__(self, bucket: FlatBucket, file: StateFile, slot_bytes: int) -> None:
        self.bucket = bucket
        self.names = list(bucket.state)
        self._file = file
        per_block = {
            name: tensor.itemsize * (1 if is_scale(name) else ALIGNMENT)
            for name, tensor in bucket.state.items()
        }
        # Every tensor in a slot begins a page, so that copies are of aligned memory.
        room = slot_bytes - mmap.PAGESIZE * len(per_block)
        blocks = room // sum(per_block.values())
        assert blocks > 0, "a slot has room for a block of any state"
        self.numel = blocks * ALIGNMENT
        self._in_slot: dict[str, int] = {}
        place = 0
        for name, nbytes in per_block.items():
            self._in_slot[name] = place
            place += -(-blocks * nbytes // mmap.PAGESIZE) * mmap.PAGESIZE

    def copied(self, window: int) -> list[_Copied]:
        """The state of window number ``window``."""
        start = window * self.numel
        stop = min(start + self.numel, self.bucket.bucket.shard_numel)
        pieces = []
        for name, tensor in self.bucket.state.items():
            part, size = part_of(name, start, stop), tensor.itemsize
            offset = self._file.offset(tensor) + part.start * size
            pieces.append(_Copied(offset, self._in_slot[name], (part.stop - part.start) * size))
        return pieces

    def staged(self, slot: Slot) -> dict[str, Tensor]:
        """A window's state in ``slot``."""
        return {
            name: torch.frombuffer(
                slot.memory,
                dtype=tensor.dtype,
                count=part_of(name, 0, self.numel).stop,
                offset=self._in_slot[name],
            )
            for name, tensor in self.bucket.state.items()
        }


@dataclass(frozen=True, slots=True)
class _Turn:
    """A window whose turn comes, and the parts of runs in it: elements ``[start, stop)`` of one."""

    windows: _Windows
    window: int
    parts: list[tuple[Run, int, int]]


class Streamed:
    """Updates buckets whose state is in ``file``: an `Updater`, see [Note: windows].

    Args:
        file: where all buckets' state is.
        backend: what updates.
    """

    def __init__(self, file: StateFile, backend: Backend) -> None:
        self.error: OSError | None = None
        self._file, self._backend, self._slot_bytes = file, backend, SLOT_BYTES
        self._slots: list[Slot] = []
        self._threads = ThreadPoolExecutor(SLOTS - 1, thread_name_prefix="shardadam state file")
        self._windows: dict[FlatBucket, _Windows] = {}

    def run(self, updates: Sequence[Update], skip: Tensor | None) -> Iterator[Update]:
        """As in `Updater`; what was written has reached the file when the last one was yielded."""
        if not self._slots:  # not earlier: whoever forks after construction need not share them
            self._slots = [Slot(index, self._slot_bytes) for index in range(SLOTS)]
        turns = [self._turns(update) for update in updates]
        coming = [turn for of_one in turns for turn in of_one]
        try:
            for slot, turn in zip(self._slots, coming, strict=False):
                slot.ready = self._threads.submit(self._go_round, slot, None, turn)
            number = 0
            for update, of_one in zip(updates, turns, strict=True):
                for turn in of_one:
                    slot, then = self._slots[number % SLOTS], number + SLOTS
                    if self._arrives(slot):
                        self._update(slot, turn, skip)
                        next_turn = coming[then] if then < len(coming) else None
                        slot.ready = self._threads.submit(self._go_round, slot, turn, next_turn)
                    number += 1
                yield update
            for slot in self._slots:
                self._arrives(slot)
        finally:
            wait([slot.ready for slot in self._slots if slot.ready is not None])

    def _arrives(self, slot: Slot) -> bool:
        """Wait for ``slot``; whether all has gone well so far."""
        try:
            if slot.ready is not None:
                slot.ready.result()
        except OSError as error:
            self.error = self.error or error
        return self.error is None

    def _go_round(self, slot: Slot, done: _Turn | None, coming: _Turn | None) -> None:
        """Write back what has been updated, then read what is to be updated next."""
        with memoryview(slot.memory) as memory:
            for piece in [] if done is None else done.windows.copied(done.window):
                self._file.write(piece.file, memory[piece.slot : piece.slot + piece.nbytes])
            for piece in [] if coming is None else coming.windows.copied(coming.window):
                self._file.read(piece.file, memory[piece.slot : piece.slot + piece.nbytes])

    def _turns(self, update: Update) -> list[_Turn]:
        """The windows that have something to update, with the runs cut at them."""
        bucket = update.grads.bucket
        windows = self._windows.get(bucket)
        if windows is None or windows.names != list(bucket.state):  # AMSGrad was switched on
            windows = self._windows[bucket] = _Windows(bucket, self._file, self._slot_bytes)
        turns: dict[int, _Turn] = {}
        for run in update.runs:
            first = bucket.first_of(run)
            start, stop = first, first + run.param.numel()
            while start < stop:
                window = start // windows.numel
                end = min((window + 1) * windows.numel, stop)
                turn = turns.setdefault(window, _Turn(windows, window, []))
                turn.parts.append((run, start - first, end - first))
                start = end
        return list(turns.values())

    def _update(self, slot: Slot, turn: _Turn, skip: Tensor | None) -> None:
        parts = [self._part(slot, turn, *part) for part in turn.parts]
        self._backend.update(parts, skip)
        for part in parts:
            part.release()

    def _part(self, slot: Slot, turn: _Turn, run: Run, start: int, stop: int) -> Run:
        """Elements ``[start, stop)`` of ``run``, their state being in ``slot``. Kept by ``run``."""
        if run.prepared is None:
            run.prepared = {}
        key = slot.index, start, stop
        part: Run | None = run.prepared.get(key)
        if part is None:
            bucket, origin = turn.windows.bucket, turn.window * turn.windows.numel
            state = turn.windows.staged(slot)
            part = run.prepared[key] = bucket.part_of_run(run, start, stop, state, origin)
        whole = stop - start == run.param.numel()
        part.grad = run.grad if whole else in_memory_order(run.grad)[start:stop]
        part.coefficients = run.coefficients
        return part
