"""What is trained: a few shapes that stress an optimizer in different ways."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from gpu.checkout import module
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Model:
    """``units`` are what FSDP2 shards one by one; ``iterations`` make a few seconds."""

    says: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    units: Callable[[nn.Module], Sequence[nn.Module]]
    iterations: int
    rows: int = 4


class SideBySide(nn.ModuleList):
    """The mean of many square layers."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self) / len(self)


class ManySmall(nn.Sequential):
    """Blocks of many square layers, each added to the stream: no gradient fades."""

    def __init__(self, blocks: int, layers: int, width: int) -> None:
        squares = (nn.Linear(width, width, bias=False) for _ in range(blocks * layers))
        super().__init__(*(SideBySide(next(squares) for _ in range(layers)) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = x + block(x)
        return x


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _linears(net: nn.Module) -> list[nn.Module]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Linear)]


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.float(), target.float())


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def _mlp(says: str, widths: Sequence[int], iterations: int) -> Model:
    def batch(rows: int, generator: torch.Generator) -> Batch:
        ends = widths[0], widths[-1]
        first, last = (torch.randn(rows, width, generator=generator) for width in ends)
        return first, last

    return Model(says, lambda: mlp(widths), batch, _squared_error, _linears, iterations)


def _many_small(blocks: int, layers: int, width: int, iterations: int) -> Model:
    def batch(rows: int, generator: torch.Generator) -> Batch:
        first, last = (torch.randn(rows, width, generator=generator) for _ in range(2))
        return first, last

    return Model(
        f"{blocks * layers} params of {width}×{width}",
        lambda: ManySmall(blocks, layers, width),
        batch,
        _squared_error,
        # One by one they would be 300 all-gathers: nobody would.
        lambda net: [*net.children()],
        iterations,
    )


def _gpt(layers: int, width: int, context: int, iterations: int) -> Model:
    gpt = module("examples/gpt.py")

    def batch(rows: int, generator: torch.Generator) -> Batch:
        text = torch.randint(gpt.VOCABULARY, (rows, context + 1), generator=generator)
        return text[:, :-1], text[:, 1:].contiguous()

    return Model(
        f"the demo's GPT, {layers} layers of width {width}, context {context}",
        lambda: gpt.GPT(layers, width, context),
        batch,
        _cross_entropy,
        lambda net: [*net.blocks],
        iterations,
    )


MODELS: dict[str, Model] = {
    "tiny": _mlp("an MLP for tests", [64] * 4, 3),
    "mlp-2M": _mlp("MLP, 8 layers of 512×512", [512] * 9, 20),
    "mlp-8M": _mlp("MLP, 8 layers of 1024×1024", [1024] * 9, 12),
    "mlp-29M": _mlp("MLP, 7 layers of 2048×2048", [2048] * 8, 8),
    "mlp-35M": _mlp("MLP, 8 layers of 2048×2048 between 256 and 256", [256, *[2048] * 9, 256], 8),
    "small-300": _many_small(10, 30, 64, 40),
    "large-2": _mlp("2 layers of 4096×4096", [4096] * 3, 6),
    "gpt": _gpt(4, 256, 64, 8),
}
