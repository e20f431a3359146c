"""torch.amp.GradScaler's protocol: it calls step() with two attributes set on the optimizer.

Each rank has a GradScaler of its own. Where only some ranks saw an overflow, all skip the step, but
those ranks alone lower their scale; from then on gradients of different scales meet, and the
optimizer brings them to the lowest before they are averaged.
"""

import torch
from torch import Tensor


def found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether GradScaler found a non-finite gradient on this rank."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())


def grad_scale(optimizer: torch.optim.Optimizer) -> float:
    """The loss scale that this rank's gradients still carry."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def check(optimizer: torch.optim.Optimizer) -> None:
    """Raise where GradScaler had nothing to look at: it would fail itself, with less to say."""
    # It adds up the flags of the devices where it saw gradients: a plain 0 if there are none.
    if isinstance(getattr(optimizer, "found_inf", None), int):
        raise RuntimeError(
            "GradScaler found no gradients. With shard_grads=True they have been sharded and freed "
            "during backward: expected shard_grads=False with GradScaler (or bfloat16, without one)"
        )
