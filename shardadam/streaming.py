"""Updates of what does not all fit where the kernel works: window by window, through slots.

[Note: windows]

A bucket's shard is updated window by window: a window is as many elements as a *slot* has room for,
which is memory of a fixed size that is used again and again. Each slot has a thread, which brings
in, updates and brings back one window after the other; while one waits, another updates:

    thread 0, slot 0   | fetch 0 | update 0 | put 0 | fetch 2 | update 2 | put 2 | fetch 4 …
    thread 1, slot 1   | fetch 1 | update 1 | put 1 | fetch 3 | update 3 | put 3 | fetch 5 …

So what a step needs in memory is the slots, however large a model or one param of it is. Windows
begin at multiples of ALIGNMENT, so that blocks of coded state are never cut, and the kernel gives
the same bits wherever a run is cut. It uses one thread for a window: OpenMP's other ones would wait
for the next by spinning, and take their cores from those that fetch and put.

A disk that fails must not leave other ranks waiting: the error is kept, nothing more is updated,
and this rank goes through the rest of the step like the others, until all meet and raise.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.kernels import Backend, Run
from shardadam.slots import Part, Slot, Window
from shardadam.updates import Update

MOST_SLOTS = 8


class Streamed:
    """Updates buckets through slots: an `Updater`, see [Note: windows].

    Args:
        make_slot: called for every slot.
        backend: what updates, in the thread that calls it.
    """

    def __init__(self, make_slot: Callable[[], Slot], backend: Backend) -> None:
        self.error: OSError | None = None
        self._make_slot, self._backend = make_slot, backend
        self._slots: list[tuple[Slot, ThreadPoolExecutor]] = []

    def run(self, updates: Sequence[Update], skip: Tensor | None) -> Iterator[Update]:
        """As in `Updater`; an update has been put back when it is yielded."""
        assert skip is None, "the host knows, and calls this or not"
        if not self._slots:  # not earlier: who never steps needs neither memory nor threads
            count = min(max(2, torch.get_num_threads()), MOST_SLOTS)
            self._slots = [
                (self._make_slot(), ThreadPoolExecutor(1, "shardadam slot")) for _ in range(count)
            ]
        for slot, _ in self._slots:
            slot.begin()
        slots = itertools.cycle(self._slots)
        rounds = [[*self._start(update, slots)] for update in updates]
        try:
            for update, of_one in zip(updates, rounds, strict=True):
                for one in of_one:
                    one.result()
                yield update
        finally:
            wait(itertools.chain.from_iterable(rounds))

    def _start(
        self, update: Update, slots: Iterator[tuple[Slot, ThreadPoolExecutor]]
    ) -> Iterator[Future[None]]:
        """Start the windows of ``update`` that have something to update."""
        bucket = update.grads.bucket
        numel = self._slots[0][0].capacity(bucket)
        cuts: dict[int, list[tuple[Run, int, int]]] = {}
        for run in update.runs:
            first = bucket.first_of(run)
            start, stop = first, first + run.param.numel()
            while start < stop:
                number = start // numel
                end = min((number + 1) * numel, stop)
                cuts.setdefault(number, []).append((run, start - first, end - first))
                start = end
        for number, cut in cuts.items():
            slot, thread = next(slots)
            origin = number * numel
            parts = [Part(*part, _staged(slot, bucket, origin, *part)) for part in cut]
            stop = min(origin + numel, bucket.bucket.shard_numel)
            yield thread.submit(self._round, slot, Window(bucket, origin, stop, parts))

    @torch.no_grad()
    def _round(self, slot: Slot, window: Window) -> None:
        """Bring in, update, bring back; in the slot's thread."""
        runs = [part.staged for part in window.parts]
        try:
            if self.error is None:
                slot.fetch(window)
                self._backend.update(runs)
                slot.put(window)
        except OSError as error:
            self.error = error
        finally:
            for run in runs:
                run.release()


def _staged(slot: Slot, bucket: FlatBucket, origin: int, run: Run, start: int, stop: int) -> Run:
    """As `Slot.stage`, with this step's gradient. What stays is kept by ``run``."""
    kept = run.prepared = {} if run.prepared is None else run.prepared
    key = slot, start, stop
    if key not in kept:
        kept[key] = slot.stage(bucket, origin, run, start, stop)
    staged: Run = kept[key]
    staged.grad = slot.grad(bucket, origin, run, start, stop)
    staged.coefficients = run.coefficients
    return staged
