"""The norm of all gradients, and what clipping by it leaves to be done by the update.

Numbers here are 0-dim float64 tensors on the params' device: nothing waits for a GPU.
"""

from dataclasses import dataclass

from torch import Tensor

from shardadam.collectives import Communicator
from shardadam.gradients import GradReducer
from shardadam.kernels import Backend
from shardadam.kernels.exact_sum import zero


@dataclass(frozen=True, slots=True)
class Clipped:
    """What clip_grad_norm_() leaves for step(): a factor, and which gradients it was made for."""

    coefficient: Tensor
    versions: list[tuple[Tensor, int] | None]


def check(clipped: Clipped | None, reducer: GradReducer) -> None:
    """Raise ValueError if a gradient has changed since ``clipped`` was made; names the param."""
    name = None if clipped is None else reducer.changed_since(clipped.versions)
    if name is not None:
        raise ValueError(
            f"the gradient of {name} changed between clip_grad_norm_() and step(): "
            "expected clip_grad_norm_() after the last backward pass"
        )


def norm(reducer: GradReducer, backend: Backend, communicator: Communicator) -> Tensor:
    """The 2-norm of the reduced gradients over all params and ranks. Collective.

    The sum of squares is exact (`kernels.exact_sum`): it has the same bits at every world size and
    bucket size.
    """
    words = zero(communicator.device)
    values = []
    for grads in reducer.grads:
        if grads.shard is not None:  # zero where there is no gradient
            values.append(grads.shard)
        else:
            values += [grads.in_place(index) for index in grads.counted()]
    backend.sum_squares(values, words)
    communicator.sum_exactly(words)
    return backend.root(words)


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of ``norm`` are multiplied by, as in torch.nn.utils.clip_grad_norm_."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
