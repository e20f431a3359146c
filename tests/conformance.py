"""torch's own lists of inputs for its optimizers, with our classes in the place of torch's."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal import common_optimizers

import shardadam
from ranks import run_ranks

KINDS = ["Adam", "AdamW", "NAdam"]
INFOS = {
    info.optim_cls.__name__: info
    for info in common_optimizers.optim_db
    if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam)
}
# differentiable=True is refused by step(): test_a_differentiable_step_is_refused says so.
FLAGS = ["foreach", "fused"]


def ours(kind: str) -> type[torch.optim.Optimizer]:
    return getattr(shardadam, kind)


def inputs(kind: str, dtype: torch.dtype = torch.float32, *flags: str) -> list[dict[str, Any]]:
    """Fresh keyword arguments for the constructor; also each with one of ``flags``."""
    given = [entry.kwargs for entry in INFOS[kind].optim_inputs_func(device="cpu", dtype=dtype)]
    supported = [flag for flag in flags if flag in INFOS[kind].supported_impls]
    off = dict.fromkeys(supported, False)
    with_flags = [off, *({**off, flag: True} for flag in supported)]
    return [copy.deepcopy({**a, **b}) for a, b in itertools.product(given, with_flags)]


def behaviour(test: Callable[[str], None]) -> Callable[[str], None]:
    """A test of ``test(kind)``: for each kind in this process, for all on two ranks alike."""

    def main(rank: int) -> None:
        for kind in KINDS:
            torch.manual_seed(0)
            try:
                test(kind)
            except Exception as error:
                raise AssertionError(f"{kind} on two ranks") from error

    @pytest.mark.filterwarnings("ignore:gradients are equal on all ranks")
    @pytest.mark.parametrize("kind", [*KINDS, "on two ranks"])
    def run(kind: str) -> None:
        torch.manual_seed(0)
        test(kind) if kind in KINDS else run_ranks(2, main)

    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    return run


def layer(dtype: torch.dtype = torch.float32, dense: bool = True) -> tuple[nn.Parameter, ...]:
    """A weight of 1,200 elements, which two ranks share, and a bias."""
    if dense:
        return tuple(nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((40, 30), (40,)))
    wider = (torch.randn(shape, dtype=dtype) for shape in ((40, 30, 2), (40, 2)))
    return tuple(nn.Parameter(tensor[..., 0]) for tensor in wider)


def loss_of(params: tuple[Tensor, ...]) -> Tensor:
    """A function of all of weight and bias, the same at every call; its gradients are set."""
    weight, bias = params[:2]
    for param in params:
        param.grad = None
    fixed = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype)
    loss = (weight.mv(fixed) + bias).abs().pow(2).sum()
    loss.backward()
    return loss


def clones(params: tuple[Tensor, ...]) -> tuple[nn.Parameter, ...]:
    return tuple(nn.Parameter(param.detach().clone()) for param in params)


def steps(optimizer: torch.optim.Optimizer, params: tuple[Tensor, ...], count: int) -> None:
    for _ in range(count):
        loss_of(params)
        optimizer.step()


def equal(left: Any, right: Any) -> bool:
    """Whether two nested values, such as state dicts, are the same to the last bit."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        same_type = isinstance(left, Tensor) and isinstance(right, Tensor)
        return same_type and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right
