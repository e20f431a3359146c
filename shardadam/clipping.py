"""The norm of all gradients, and what clipping by it leaves to be done by the update."""

from dataclasses import dataclass

from torch import Tensor

from shardadam.collectives import Communicator
from shardadam.gradients import GradReducer
from shardadam.kernels import Backend, exact_sum


@dataclass(frozen=True, slots=True)
class Clipped:
    """What clip_grad_norm_() leaves for step(): a factor, and which gradients it was made for."""

    coefficient: float
    versions: list[tuple[Tensor, int] | None]


def norm(reducer: GradReducer, backend: Backend, communicator: Communicator) -> float:
    """The 2-norm of the reduced gradients over all params and ranks. Collective.

    The sum of squares is exact (`kernels.exact_sum`): it has the same bits at every world size and
    bucket size.
    """
    words = exact_sum.zero(communicator.device)
    for grads in reducer.grads:
        if grads.shard is not None:  # zero where there is no gradient
            backend.sum_squares(grads.shard, words)
            continue
        for index in grads.owned():
            backend.sum_squares(grads.in_place(index), words)
    communicator.sum_exactly(words)
    return exact_sum.root(words)


def coefficient(norm: float, max_norm: float) -> float:
    """What gradients of ``norm`` are multiplied by, as in torch.nn.utils.clip_grad_norm_."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor
