"""Which samples make up the batch of a step: a function of the step, whatever the ranks."""

import functools
import random
from collections.abc import Iterator

import torch
import torch.distributed as dist


class Batches:
    """Global batches in a shuffled order, each shared out among the ranks.

    A batch depends on the seed and the step alone: a resumed run draws the same ones without going
    through those before, and on another number of ranks too. Every epoch has an order of its own;
    what is left at its end and makes no batch is left out.

    Args:
        samples: in the data set.
        batch_size: over all ranks.
        seed: of the order.
        rank: this process's; by default, of torch.distributed.
        world_size: likewise; divides ``batch_size``.

    Raises:
        ValueError: ``batch_size`` can't be shared out, or is more than there are samples.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        self.rank = (0 if alone else dist.get_rank()) if rank is None else rank
        ranks = (1 if alone else dist.get_world_size()) if world_size is None else world_size
        if batch_size <= 0 or batch_size % ranks:
            raise ValueError(
                f"batch_size: expected a multiple of {ranks} ranks, found {batch_size}"
            )
        if batch_size > samples:
            raise ValueError(f"batch_size: {batch_size} is more than there are samples, {samples}")
        self.samples, self.batch_size, self.seed, self.world_size = samples, batch_size, seed, ranks
        self.steps_per_epoch = samples // batch_size
        # Of this and the last epoch: a loader with workers reads ahead.
        self._order = functools.lru_cache(2)(self._draw)

    def of(self, step: int) -> list[int]:
        """The numbers of this rank's samples in the batch of ``step``, which counts from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        first = batch * self.batch_size
        mine = slice(first + self.rank, first + self.batch_size, self.world_size)
        numbers: list[int] = self._order(epoch)[mine].tolist()
        return numbers

    def after(self, step: int) -> Iterator[list[int]]:
        """Those of ``step`` and all after it, without end: a batch_sampler for a DataLoader."""
        while True:
            yield self.of(step)
            step += 1

    def _draw(self, epoch: int) -> torch.Tensor:  # 8 bytes per sample, not a list's 36
        drawn = random.Random(f"{self.seed}/{epoch}").getrandbits(63)
        generator = torch.Generator().manual_seed(drawn)
        return torch.randperm(self.samples, generator=generator)
