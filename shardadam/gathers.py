"""Updated params on their way to every rank, and who waits for them."""

import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.exchange import Exchange


class Gathers:
    """The all-gathers under way. A rank may wait when it likes: all have been entered by all.

    ``whole`` is told of every bucket whose params are.
    """

    def __init__(self, communicator: Communicator, whole: Callable[[FlatBucket], None]) -> None:
        self._communicator, self._whole = communicator, whole
        self._under_way: dict[FlatBucket, tuple[Exchange, list[Tensor]]] = {}
        while _left:
            _left.pop().wait()
        weakref.finalize(self, _leave, self._under_way)

    @property
    def under_way(self) -> bool:
        """Whether any params are not whole yet, for all that this rank knows."""
        return bool(self._under_way)

    def start(self, bucket: FlatBucket, updated: list[Tensor]) -> None:
        """Send this rank's shard of ``bucket``, of whose params ``updated`` have changed."""
        self._under_way[bucket] = self._communicator.start_all_gather(bucket.memory.flat), updated

    def wait(self, buckets: Iterable[FlatBucket]) -> None:
        """Until the params of ``buckets`` are whole."""
        for bucket in buckets:
            if bucket in self._under_way:
                exchange, updated = self._under_way[bucket]
                exchange.wait()
                # Kernels and exchanges write raw memory: autograd must learn that what it saved has
                # changed. Not before the wait: so it also finds who has read a param too early.
                torch.autograd.graph.increment_version(updated)
                del self._under_way[bucket]
                self._whole(bucket)

    def wait_for_all(self) -> None:
        """Until all params are whole."""
        if self._under_way:
            self.wait(list(self._under_way))


# Of optimizers that are gone, until the next is made. gloo breaks off the connection when data
# comes for a receive that nobody holds any more, and with it what other optimizers exchange; and it
# tells nobody but a waiter that a receive is done.
_left: list[Exchange] = []


def _leave(under_way: Mapping[FlatBucket, tuple[Exchange, list[Tensor]]]) -> None:
    """Keep what an optimizer leaves under way."""
    _left.extend(exchange for exchange, _ in under_way.values())
