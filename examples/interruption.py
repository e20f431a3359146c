"""Ctrl-C as a request that all ranks grant at the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist


class Interruption:
    """Catches SIGINT and SIGTERM from construction on; the training loop asks at every step."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def meet(self, loss: float) -> tuple[float, bool]:
        """The mean of ``loss`` over the ranks, and whether any of them was asked to stop.

        The signal reaches the ranks at different times, maybe in different steps. Were each to act
        on its own, those going on would wait forever for the one that left.
        """
        if not dist.is_initialized():
            return loss, self.requested
        words = torch.tensor([loss, self.requested], dtype=torch.float64)
        dist.all_reduce(words)
        return words[0].item() / dist.get_world_size(), words[1].item() > 0
