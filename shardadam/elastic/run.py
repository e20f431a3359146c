"""A training loop that goes on where an earlier process of it ended."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardadam import checkpoint
from shardadam.agreement import Point, meet
from shardadam.checkpoint.saving import communicator_of
from shardadam.elastic.requests import Requests
from shardadam.optimizer import ShardedOptimizer

_EXIT_CODE = "SHARDADAM_PREEMPTED_EXIT_CODE"


class Preempted(SystemExit):
    """A signal asked for the end, and all is saved: ends the process, unless it is caught.

    With 0, for which torchrun and SLURM leave it at that. Where 0 means that the training is done,
    as in a Job of Kubernetes, the launch file sets SHARDADAM_PREEMPTED_EXIT_CODE.

    Attributes:
        step: how many steps have been made.
        path: of the checkpoint.

    Raises:
        ValueError: SHARDADAM_PREEMPTED_EXIT_CODE is no exit code.
    """

    def __init__(self, step: int, path: Path) -> None:
        super().__init__(_exit_code())
        self.step, self.path = step, path

    def __str__(self) -> str:
        return f"asked to end after step {self.step}, which is saved in {self.path}"


class Run:
    """Loads the newest whole checkpoint of a folder, if there is one, and saves into it.

    Made on every rank, at the start of the program, whichever number of ranks there is now. What is
    given is loaded in place: `shardadam.checkpoint.load` says how.

    Attributes:
        step: how many steps have been made.
        extras: plain values and tensors that are saved too, such as losses; the caller's.
        loaded: what was loaded, see `checkpoint.Loaded`; None in a new run.

    Args:
        directory: of the checkpoints, which all ranks see.
        every: steps between checkpoints.
        model: saved and loaded with its buffers.
        optimizer: one of shardadam's.
        lr_scheduler: a scheduler.
        keep: how many checkpoints to keep.
        rng: whether to save the random number generators; restored on the ranks that there were.
        process_group: the ranks, where there is no optimizer.

    Raises:
        CheckpointError: there are checkpoints, and none that is whole and fits.
        OSError: the first rank can't read the directory. This and the former on every rank.
        ValueError: ``every`` is not positive, or SHARDADAM_PREEMPTED_EXIT_CODE no exit code.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int,
        model: nn.Module | None = None,
        optimizer: ShardedOptimizer | None = None,
        lr_scheduler: Any = None,
        keep: int | None = 2,
        rng: bool = True,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        if every <= 0:
            raise ValueError(f"every: expected steps between checkpoints, found {every}")
        _exit_code()  # a wrong one is refused now, and not when the node goes away
        self.step, self.extras = 0, dict[str, Any]()
        self.loaded: checkpoint.Loaded | None = None
        self._directory, self._every, self._keep = Path(directory), every, keep
        self._parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "rng": rng}
        self._parts |= {"lr_scheduler": lr_scheduler, "process_group": process_group}
        self._communicator = communicator_of(optimizer, process_group)
        try:
            self.loaded = checkpoint.load(directory, **self._parts)
        except checkpoint.NoCheckpoint:
            pass  # a new run
        else:
            self.step, self.extras = self.loaded.step, dict(self.loaded.extras)

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps that are left of ``total``, for a loop that makes one of each.

        After each of them the ranks meet. SIGTERM and SIGUSR1 on any rank have all of them save
        after the same step and raise `Preempted`.

        Raises:
            RuntimeError: another rank failed, or left.
        """
        with Requests() as requests:
            while self.step < total:
                yield self.step
                self.step += 1
                words = {"asked": requests.received is not None, "step": self.step}
                seen = meet(self._communicator, Point.LOOP, words)
                if not seen["step"].agreed:
                    low, high = seen["step"].low, seen["step"].high
                    raise RuntimeError(f"ranks are after different steps, {low} to {high}")
                asked = seen["asked"].high
                if asked or self.step == total or self.step % self._every == 0:
                    path = self.save()
                    if asked and self.step < total:
                        raise Preempted(self.step, path)

    def save(self) -> Path:
        """Save now; `steps` does as it is due. Collective."""
        return checkpoint.save(
            self._directory, step=self.step, keep=self._keep, extras=self.extras, **self._parts
        )


def _exit_code() -> int:
    code = os.environ.get(_EXIT_CODE, "0")
    if not (code.isascii() and code.isdigit() and int(code) < 256):
        raise ValueError(f"{_EXIT_CODE}: expected a number from 0 to 255, found {code!r}")
    return int(code)
