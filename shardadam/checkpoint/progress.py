"""A progress bar for what takes long, where somebody looks."""

import sys
import threading

from tqdm import tqdm


class _OwnBar(tqdm):  # type: ignore[misc]  # which has no types
    """tqdm of this process alone.

    tqdm's lock is shared with forked processes: one that is killed while it holds it stops all
    others. Its thread looks for bars that stand still, and a process may want to fork.
    """

    monitor_interval = 0


_OwnBar.set_lock(threading.RLock())


class Bar:
    """Bytes done, on rank 0's terminal, once a second has passed; silent elsewhere."""

    def __init__(self, doing: str, total: int, rank: int) -> None:
        self._lock = threading.Lock()
        self._bar = None
        if rank == 0 and sys.stderr.isatty():
            self._bar = _OwnBar(
                desc=doing,
                total=total,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                delay=1.0,
                leave=False,
            )

    def __call__(self, count: int) -> None:
        """So many bytes more; from any thread."""
        if self._bar is not None:
            with self._lock:
                self._bar.update(count)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
