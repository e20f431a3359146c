"""TensorBoard: after each step of an optimizer, scalars of what it did.

    log = tensorboard.StepLog(optimizer, "runs/first")  # on every rank; the first writes
    …
    log.close()

It hangs on the optimizer, so it works in any loop, a Trainer's too.
"""

import os
from typing import Any, Protocol

from shardadam.optimizer import ShardedOptimizer


class Writer(Protocol):
    """A `torch.utils.tensorboard.SummaryWriter`, or what takes scalars as it does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Write one number."""


class StepLog:
    """Writes `optimizer.stats()` as scalars, from a hook that runs after each step.

    "shardadam/grad_norm" of the last step, if it was measured; "shardadam/skipped_steps" so far;
    "shardadam/sent_bytes" and "shardadam_seconds/…", means per step since the last time:
    "exposed_communication" is "reduce" and "gather", what the host waited for or did in exchanges
    beside which nothing else went on. Seconds do not wait for a GPU; a grad_norm there is waited
    for. Never communicates.

    Args:
        optimizer: one of shardadam's.
        writer: what writes, or the directory for a `SummaryWriter` of its own. Not looked at on
            ranks that do not write.
        every: steps from one time to the next.
        steps_before: of a run that goes on, how many steps it had made.
        rank: which rank of the optimizer's writes; None: each, to a writer or directory of its own.

    Raises:
        ValueError: an argument is wrong.
        ImportError: a directory was given, and TensorBoard is not installed.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        writer: Writer | str | os.PathLike[str],
        *,
        every: int = 1,
        steps_before: int = 0,
        rank: int | None = 0,
    ) -> None:
        if not isinstance(optimizer, ShardedOptimizer):
            raise ValueError(
                f"optimizer: expected one of shardadam's, found {type(optimizer).__name__}"
            )
        if every < 1:
            raise ValueError(f"every: expected a number of steps, found {every}")
        ranks = optimizer._communicator
        if rank is not None and not 0 <= rank < ranks.world_size:
            raise ValueError(f"rank: expected one of {ranks.world_size} or None, found {rank}")
        self._writer: Writer
        self._hook = self._own = None
        if rank not in (None, ranks.rank):
            return
        if isinstance(writer, str | os.PathLike):
            self._writer = self._own = _summary_writer(writer)
        elif hasattr(writer, "add_scalar"):
            self._writer = writer
        else:
            raise ValueError(
                f"writer: expected a SummaryWriter or a directory, found {type(writer).__name__}"
            )
        self._every, self._steps_before, self._since = every, steps_before, 0
        self._last = optimizer.stats()
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def close(self) -> None:
        """Write no more, and close the `SummaryWriter` that was made for a directory."""
        if self._hook is not None:
            self._hook.remove()
        if self._own is not None:
            self._own.close()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._since += 1
        if self._since == self._every:
            stats = optimizer.stats()
            for tag, value in _scalars(self._last, stats, self._since).items():
                self._writer.add_scalar(tag, value, self._steps_before + stats["steps"])
            self._last, self._since = stats, 0


def _scalars(before: dict[str, Any], now: dict[str, Any], steps: int) -> dict[str, float]:
    """What to write, by tag."""

    def per_step(name: str) -> dict[str, float]:
        return {key: (value - before[name].get(key, 0)) / steps for key, value in now[name].items()}

    seconds = per_step("seconds")
    seconds["exposed_communication"] = sum(
        seconds.get(phase, 0.0)
        for phase in ("reduce", "gather")  # none yet if all was skipped
    )
    found = {f"shardadam_seconds/{phase}": value for phase, value in seconds.items()}
    found["shardadam/sent_bytes"] = sum(per_step("sent_bytes").values())
    for tag, value in (("grad_norm", now["grad_norm"]), ("skipped_steps", now["skipped"])):
        if value is not None:
            found[f"shardadam/{tag}"] = value
    return found


def _summary_writer(directory: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "shardadam.integrations.tensorboard needs TensorBoard to write to "
            f"{os.fspath(directory)}: pip install 'shardadam[tensorboard]'"
        ) from error
    return SummaryWriter(directory)
