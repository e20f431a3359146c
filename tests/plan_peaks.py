"""Four models, trained in a mode each: what is planned, and the peaks, measured by this script."""

import ctypes
import gc
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peaks import memory
from torch import Tensor, nn

import shardadam
from ranks import run_ranks
from shardadam.cli.footprint import Plan, Trained

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from gpt import GPT

_M_MMAP_THRESHOLD = -3  # of malloc.h
MIB = 2**20
WORLD_SIZES = (1, 2, 4)


class Encoder(nn.Module):
    """Post-norm transformer blocks over tokens."""

    def __init__(self, layers: int = 4, width: int = 384, vocabulary: int = 8000) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 6, 4 * width, 0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def perceptron(layers: int = 14, width: int = 1000) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def convolutions(width: int = 320, layers: int = 10) -> nn.Module:
    inner = [nn.Conv2d(width, width, 3, padding=1) for _ in range(layers)]
    return nn.Sequential(nn.Conv2d(3, width, 3), *inner, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def demo(table_rows: int = 8192) -> nn.Module:
    return GPT(2, 128, 128, table_rows=table_rows)


@dataclass(frozen=True)
class Case:
    """How a model is built, its input (of few activations), of what size it warms up; the mode."""

    name: str
    make: Callable[..., nn.Module]
    inputs: Callable[[], Tensor]
    small: dict[str, Any]
    dtype: torch.dtype
    grads: str
    memory: str

    def plan(self, world_size: int) -> Plan:
        with torch.device("meta"):
            model = self.make().to(self.dtype)
        grads = "plain" if (world_size, self.grads) == (1, "shard_grads") else self.grads
        (plan,) = [
            plan
            for plan in plans_of(model, world_size)
            if (plan.grads, plan.memory) == (grads, self.memory)
        ]
        return plan


CASES = [
    Case(
        *("demo", demo, lambda: torch.randint(256, (1, 16)), {"table_rows": 100}),
        *(torch.float32, "plain", "full"),
    ),
    Case(
        *("perceptron", perceptron, lambda: torch.randn(2, 1000), {"layers": 1}),
        *(torch.float32, "shard_grads", "full"),
    ),
    Case(
        *("encoder", Encoder, lambda: torch.randint(100, (1, 8)), {"layers": 1, "vocabulary": 128}),
        *(torch.bfloat16, "update_in_backward", "full"),
    ),
    Case(
        *("convolutions", convolutions, lambda: torch.randn(1, 3, 6, 6), {"layers": 1}),
        *(torch.bfloat16, "plain", "lean"),
    ),
]


def plans_of(model: nn.Module, world_size: int) -> list[Plan]:
    trained = Trained([*model.named_parameters()])
    return trained.plans("", world_size, "gloo", 16 * MIB, 0)


def peak_of_training(rank: int, case: Case, plan: Plan) -> int:
    """Bytes of resident memory that making a model and training it takes, at the peak."""
    # Let glibc give back what is freed at once, so that the peak is that of what is in use.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 65536)

    def train(model: nn.Module) -> None:
        model.to(case.dtype)
        options = {} if plan.grads == "plain" else {plan.grads: True}
        optimizer = shardadam.AdamW(model.parameters(), memory=plan.memory, **options)
        for _ in range(2):
            given = case.inputs()
            given = given.to(case.dtype) if given.is_floating_point() else given
            model(given).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(case.make(**case.small))  # brings code into memory, and what libraries keep
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    train(case.make())
    return (memory("VmHWM") - before) * 1024


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # What torch imports with the first optimizer, before ranks are forked: 1 s for each.
    shardadam.AdamW(nn.Linear(3, 3).parameters())
    found = {
        f"{case.name} {ranks}": max(run_ranks(ranks, peak_of_training, case, case.plan(ranks)))
        for case in CASES
        for ranks in WORLD_SIZES
    }
    print(json.dumps(found))
