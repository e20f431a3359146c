"""What is under way between the ranks, and how to wait for it."""

import atexit
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any
from weakref import ref

from torch import Tensor


class Exchange:
    """Data under way.

    Args:
        says: a context in which errors tell what was being done.
        works: torch.distributed's.
        finish: what is left to be done with the data.
        timeout: as in `await_work`.
    """

    def __init__(
        self,
        says: Callable[[], AbstractContextManager[None]],
        works: Sequence[Any],
        finish: Callable[[], object] | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self._says, self._works, self._finish = says, works, finish
        self._timeout = timeout

    def wait(self) -> None:
        """Until the data is there; on a GPU, the current stream waits and the host does not."""
        with self._says():
            for work in self._works:
                await_work(work, self._timeout)
        self._works = ()
        if self._finish is not None:
            self._finish()
            self._finish = None


def await_work(work: Any, timeout: timedelta | None) -> None:
    """Until it is done, or ``timeout`` is over; None: that which torch knows.

    gloo's sends and receives only know the one with which their group was made, not one that it was
    given later. NCCL's are to be awaited by the stream, and a timeout here would hold up the host.
    """
    if timeout is None:
        work.wait()
    else:
        work.wait(timeout)


class Union:
    """Flags under way."""

    def __init__(self, flags: Tensor, exchange: Exchange) -> None:
        self._flags, self._exchange = flags, exchange

    def wait(self) -> list[bool]:
        """Element by element, whether any rank's flag is set."""
        self._exchange.wait()
        return [bool(flag) for flag in self._flags.tolist()]


# [Note: tensors in flight]
#
# gloo's thread lets go of a tensor some time after wait() has returned, for which it takes the GIL.
# If the interpreter has begun to exit by then, and somebody still holds the process group (torch's
# compiler does, if it was imported after init_process_group()), the thread is killed in a way that
# aborts the process: "terminate called without an active exception". So exit waits for it. Weak
# references tell: they live as long as anybody, also C++, holds the tensor, and keep no memory.
_in_flight: dict[int, ref[Tensor]] = {}


def watch(tensor: Tensor) -> None:
    """Let exit wait until ``tensor``, which is being sent or received, is let go of."""
    key = id(tensor)
    _in_flight[key] = ref(tensor, lambda _: _in_flight.pop(key, None))


@atexit.register
def _let_go() -> None:
    """Until only Python holds what was sent and received, a second at most."""
    deadline = time.monotonic() + 1.0
    for alive in list(_in_flight.values()):
        while (tensor := alive()) is not None and time.monotonic() < deadline:
            if tensor._use_count() == 1:  # type: ignore[attr-defined]
                break
            del tensor
            time.sleep(0.0001)
