"""A step captured in a CUDA graph: replays against eager steps, bit by bit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import shardadam
from gpu.equal import same_bits
from gpu.report import Clock, Report, listed

CLAIM = "replays of a captured step equal eager steps"
SHAPES = [(1,), (129,), (64, 65), (8193,), (300, 301), *((1 + i % 37,) for i in range(150))]
REPLAYS = 100
WARM_UP = 3
CASES: dict[str, tuple[type[torch.optim.Optimizer], torch.dtype, dict[str, Any]]] = {
    "AdamW, fp32": (shardadam.AdamW, torch.float32, {}),
    "AdamW, fp32, clipped": (shardadam.AdamW, torch.float32, {"max_grad_norm": 0.5}),
    "AdamW, bf16, clipped": (shardadam.AdamW, torch.bfloat16, {"max_grad_norm": 0.5}),
    "NAdam, fp32, several buckets": (shardadam.NAdam, torch.float32, {"bucket_bytes": 100_000}),
}


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``step`` as a graph, after a few steps on a side stream as torch's documentation has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def check(report: Report, device: torch.device, clock: Clock, quick: bool) -> None:
    """Every case."""
    wrong, count = [], 0
    for case in CASES:
        if clock.left < 0:
            report.skip(f"{CLAIM} ({case})", "time was up")
            continue
        count += 1
        try:
            wrong += [f"{what} ({case})" for what in replay(case, device)]
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error} ({case})")
    report.numbers["graph"] = {"cases": count, "replays": REPLAYS, "wrong": wrong}
    detail = f"{count} optimizers, {REPLAYS} replays each, lr and gradients new every time"
    if wrong:
        detail += f", {len(wrong)} differences: {listed(wrong)}"
    report.judge(not wrong and count > 0, CLAIM, detail)


class _Side:
    """An optimizer whose gradients and lr stay where they are."""

    def __init__(self, case: str, device: torch.device) -> None:
        optimizer_class, dtype, options = CASES[case]
        generator = torch.Generator().manual_seed(0)
        self.lr = torch.full((), 1e-2, device=device)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
            for shape in SHAPES
        ]
        for param in self.params:
            param.grad = torch.full_like(param, 1e-3)
        self.optimizer = optimizer_class(self.params, lr=self.lr, **options)

    def give(self, number: int) -> None:
        """Gradients and lr of step ``number``."""
        self.lr.fill_(1e-2 / (1 + number))
        generator = torch.Generator().manual_seed(number)
        size = sum(param.numel() for param in self.params)
        made = torch.randn(size, generator=generator).mul_(0.1).to(self.lr.device)
        for param, values in zip(
            self.params, made.split([param.numel() for param in self.params]), strict=True
        ):
            param.grad.copy_(values.view_as(param))


def replay(case: str, device: torch.device) -> list[str]:
    """What differs between a captured and an eager optimizer."""
    captured, eager = _Side(case, device), _Side(case, device)
    graph = capture(captured.optimizer.step)
    for _ in range(WARM_UP):
        eager.optimizer.step()
    for number in range(REPLAYS):
        captured.give(number)
        graph.replay()
        eager.give(number)
        eager.optimizer.step()
    differing = []
    norm = eager.optimizer.grad_norm
    if norm is not None and not same_bits(captured.optimizer.grad_norm, norm):
        differing.append("grad_norm")
    for index, (param, other) in enumerate(zip(captured.params, eager.params, strict=True)):
        if not same_bits(param, other):
            differing.append(f"param {index}")
        state = eager.optimizer.state[other]
        for name, value in captured.optimizer.state[param].items():
            if not same_bits(value, state[name]):
                differing.append(f"{name} of param {index}")
    if eager.optimizer.state[eager.params[0]]["step"] != WARM_UP + REPLAYS:
        differing.append("the number of eager steps")
    return differing
