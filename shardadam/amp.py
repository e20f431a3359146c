"""torch.amp.GradScaler's protocol: it calls step() with two attributes set on the optimizer.

Each rank has a GradScaler of its own. Where only some ranks saw an overflow, all skip the step, but
those ranks alone lower their scale; from then on gradients of different scales meet, and the
optimizer brings them to the lowest before they are averaged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.agreement import Range
from shardadam.collectives import Communicator


@dataclass(frozen=True, slots=True)
class Scaling:
    """What GradScaler says about the gradients, the same on all ranks; 0-dim tensors.

    ``scale`` (float64) is the lowest of the ranks' loss scales, ``rescale`` what brings this rank's
    gradients to it. ``skip`` (float32) is not 0 where a rank found a non-finite gradient. All None
    without a GradScaler.
    """

    scale: Tensor | None = None
    rescale: Tensor | None = None
    skip: Tensor | None = None

    def skips(self, *, on_host: bool) -> bool:
        """Whether the host skips the step; on a GPU the kernels do."""
        return on_host and self.skip is not None and bool(self.skip)


_ATTRIBUTES = ("grad_scale", "found_inf")


def in_use(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler is calling."""
    return any(isinstance(getattr(optimizer, name, None), Tensor) for name in _ATTRIBUTES)


def agree(optimizer: torch.optim.Optimizer, communicator: Communicator, scaled: Range) -> Scaling:
    """The scaling for all ranks, of which some may have no GradScaler. Collective.

    ``scaled`` is what the ranks said of `in_use`.
    """
    if not scaled.high:
        return Scaling()
    own, found = (
        value.detach().to(communicator.device, dtype).reshape(())
        if isinstance(value := getattr(optimizer, name, None), Tensor)
        else torch.full((), default, dtype=dtype, device=communicator.device)
        for name, dtype, default in zip(
            _ATTRIBUTES, (torch.float64, torch.float32), (1.0, 0.0), strict=True
        )
    )
    if communicator.world_size == 1:
        return Scaling(scale=own, skip=found)
    lowest, found = own.clone(), found.clone()
    communicator.minimum(lowest)
    communicator.maximum(found)
    return Scaling(lowest, lowest / own, found)


def check(optimizer: torch.optim.Optimizer, reduced: bool) -> None:
    """Raise where GradScaler had nothing to look at: it would fail itself, with less to say.

    ``reduced``: gradients of ranks that may differ in their scales have been averaged already.
    """
    if reduced and in_use(optimizer):
        raise RuntimeError(
            "gradients were reduced during backward, in which ranks with GradScalers may differ in "
            "scale: expected DDP without the hook (or bfloat16, without a GradScaler)"
        )
    # It adds up the flags of the devices where it saw gradients: a plain 0 if there are none.
    if isinstance(getattr(optimizer, "found_inf", None), int):
        raise RuntimeError(
            "GradScaler found no gradients. With shard_grads=True, update_in_backward=True or "
            "exact_microbatches they have been freed during backward: expected neither with "
            "GradScaler (or bfloat16, without one)"
        )
