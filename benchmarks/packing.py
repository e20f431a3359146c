"""Two ways to a flat buffer of gradients: packed after backward, or accumulated into views of it.

python benchmarks/packing.py
"""

from collections.abc import Callable

import torch
from stamp import interleaved, stamp, table
from torch import Tensor, nn
from training.models import MODELS

PACKED = "fresh gradients, then packed in one pass"


def main() -> None:
    """Print a table for a model of few large and one of many small params."""
    for name in ("mlp-35M", "small-300"):
        functions = {
            "neither: backward alone": _iteration(name, lambda params, flat: None),
            PACKED: _iteration(name, _pack),
            "accumulated into views of a zeroed buffer": _iteration(name, _accumulate),
        }
        print(f"\nforward and backward to a flat buffer of gradients, {name}, {stamp()}\n")
        print(table(interleaved(functions, repeats=30), PACKED))


After = Callable[[list[nn.Parameter], list[Tensor]], None]


def _iteration(name: str, after: After) -> Callable[[], None]:
    """Forward, backward, and what comes ``after`` it, given the params and views of the buffer."""
    torch.manual_seed(0)
    model = MODELS[name]
    module = model.make()
    inputs, target = model.batch(model.rows, torch.Generator().manual_seed(0))
    params = [*module.parameters()]
    flat = torch.zeros(sum(param.numel() for param in params))
    parts = flat.split([param.numel() for param in params])
    views = [part.view_as(param) for part, param in zip(parts, params, strict=True)]
    if after is _accumulate:
        after(params, views)

    def run() -> None:
        model.loss(module(inputs), target).backward()
        after(params, views)
        if after is not _accumulate:
            module.zero_grad()

    return run


def _pack(params: list[nn.Parameter], views: list[Tensor]) -> None:
    torch._foreach_copy_(views, [param.grad for param in params if param.grad is not None])


def _accumulate(params: list[nn.Parameter], views: list[Tensor]) -> None:
    """The buffer is there after backward; it is zeroed for the next one."""
    for param, view in zip(params, views, strict=True):
        param.grad = view
    torch._foreach_zero_(views)


if __name__ == "__main__":
    main()
