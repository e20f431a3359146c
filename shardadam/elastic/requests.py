"""Signals that ask a process to end, as its launcher sends them."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """A context in which `ASKING` signals are noted, and no longer end the process.

    Those to a process that is forked in it do what they did before.

    ``received``: the last one, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Requests":
        """Handle them from now on.

        Raises:
            RuntimeError: not in the main thread, which alone gets signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals come to the main thread: expected the training loop there")
        self._before = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Handle them as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self.received = signal.Signals(number)
        else:  # forked: a loader's worker, which nobody would end otherwise
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)
