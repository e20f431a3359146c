"""Updates of state that lives in a file: read, updated, written back.

[Note: windows]

A bucket's shard is updated window by window: a window has as many elements as have room for their
state in a *slot*, memory of a fixed size that is used again and again. Each thread has a slot, and
takes every window through it; while one waits for the disk, another updates:

    thread 0, slot 0   | read 0 | update 0 | write 0 | read 2 | update 2 | write 2 | read 4 …
    thread 1, slot 1   | read 1 | update 1 | write 1 | read 3 | update 3 | write 3 | read 5 …

So what a step needs in memory is the slots, however large a model or one param of it is. Windows
begin at multiples of ALIGNMENT, so that blocks of coded state are never cut, and the kernel gives
the same bits wherever a run is cut. It uses one thread for a window: OpenMP's other ones would wait
for the next by spinning, and take their cores from those that read and write.

A disk that fails must not leave other ranks waiting: the error is kept, nothing more is updated,
and this rank goes through the rest of the step like the others, until all meet and raise.
"""

import itertools
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

SLOT_BYTES = 4 * 2**20
MOST_SLOTS = 8


class _Slot:
    """Memory for one window's state, and the thread that uses it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.memory = mmap.mmap(-1, SLOT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="shardadam state file")


@dataclass(frozen=True, slots=True)
class _Copied:
    """Bytes of a window: where they are in the file, and in a slot."""

    file: int
    slot: int
    nbytes: int


class _Windows:
    """How a bucket's shard is cut into windows, and where their state is in a slot."""

    def __init__(self, bucket: FlatBucket, file: StateFile) -> None:
        self.bucket = bucket
        self.names = list(bucket.state)
        self._file = file
        per_block = {
            name: tensor.itemsize * (1 if is_scale(name) else ALIGNMENT)
            for name, tensor in bucket.state.items()
        }
        # Every tensor in a slot begins a page, so that copies are of aligned memory.
        room = SLOT_BYTES - mmap.PAGESIZE * len(per_block)
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

    def staged(self, slot: _Slot) -> dict[str, Tensor]:
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
        backend: what updates, in the thread that calls it.
    """

    def __init__(self, file: StateFile, backend: Backend) -> None:
        self.error: OSError | None = None
        self._file, self._backend = file, backend
        self._slots: list[_Slot] = []
        self._windows: dict[FlatBucket, _Windows] = {}

    def run(self, updates: Sequence[Update], skip: Tensor | None) -> Iterator[Update]:
        """As in `Updater`; an update has reached the file when it is yielded."""
        assert skip is None, "the host knows, and calls this or not"
        if not self._slots:  # not earlier: who never steps needs neither memory nor threads
            count = min(max(2, torch.get_num_threads()), MOST_SLOTS)
            self._slots = [_Slot(index) for index in range(count)]
        slots = itertools.cycle(self._slots)
        rounds = [
            [self._start_round(next(slots), turn) for turn in self._turns(update)]
            for update in updates
        ]
        try:
            for update, of_one in zip(updates, rounds, strict=True):
                for one in of_one:
                    one.result()
                yield update
        finally:
            wait(itertools.chain.from_iterable(rounds))

    def _start_round(self, slot: _Slot, turn: _Turn) -> Future[None]:
        parts = [self._part(slot, turn, *part) for part in turn.parts]
        return slot.thread.submit(self._round, slot, turn, parts)

    def _round(self, slot: _Slot, turn: _Turn, parts: list[Run]) -> None:
        """Read, update, write; in the slot's thread."""
        copied = turn.windows.copied(turn.window)
        try:
            with memoryview(slot.memory) as memory:
                if self.error is None:
                    for piece in copied:
                        self._file.read(piece.file, memory[piece.slot : piece.slot + piece.nbytes])
                    self._backend.update(parts)
                    for piece in copied:
                        self._file.write(piece.file, memory[piece.slot : piece.slot + piece.nbytes])
        except OSError as error:
            self.error = error
        finally:
            for part in parts:
                part.release()

    def _turns(self, update: Update) -> list[_Turn]:
        """The windows that have something to update, with the runs cut at them."""
        bucket = update.grads.bucket
        windows = self._windows.get(bucket)
        if windows is None or windows.names != list(bucket.state):  # AMSGrad was switched on
            windows = self._windows[bucket] = _Windows(bucket, self._file)
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

    def _part(self, slot: _Slot, turn: _Turn, run: Run, start: int, stop: int) -> Run:
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
