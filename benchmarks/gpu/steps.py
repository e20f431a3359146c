"""Whole optimizers, on the GPU and on the CPU, given the same gradients: the same bits."""

from typing import Any

import torch
from torch import Tensor, nn

import shardadam
from gpu.equal import same_bits
from gpu.report import Clock, Report, listed

CLAIM = "optimizers bitwise equal to the CPU's"

# Shapes around vectors and parts, a large one, and more params than one launch takes.
SHAPES = [(1,), (7,), (129,), (64, 65), (8193,), (300, 301), *((1 + i % 37,) for i in range(250))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPS = 6
CASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (shardadam.AdamW, {}),
    "AdamW, fp32 master": (shardadam.AdamW, {"master": "fp32"}),
    "AdamW, clipped, maximizing": (shardadam.AdamW, {"max_grad_norm": 0.05, "maximize": True}),
    "AdamW, clip_grad_norm_()": (shardadam.AdamW, {"clip": 0.05}),
    "AdamW, lr a tensor": (shardadam.AdamW, {"lr_tensor": True}),
    "Adam, L2, AMSGrad, clipped": (
        shardadam.Adam,
        {"weight_decay": 0.1, "amsgrad": True, "max_grad_norm": 0.05},
    ),
    "NAdam": (shardadam.NAdam, {"weight_decay": 0.01}),
    "NAdam, several buckets": (shardadam.NAdam, {"bucket_bytes": 40_000}),
    "AdamW, GradScaler": (shardadam.AdamW, {"scaler": True}),
    "Adam, GradScaler, clipped": (shardadam.Adam, {"scaler": True, "max_grad_norm": 0.05}),
}
# Only 16-bit params have a master; a loss scale is for float16.
DTYPES_OF = {
    "AdamW, fp32 master": (torch.bfloat16, torch.float16),
    "AdamW, GradScaler": (torch.float32, torch.float16),
    "Adam, GradScaler, clipped": (torch.float32, torch.float16),
}


class Training:
    """An optimizer of its own on one device."""

    def __init__(self, case: str, dtype: torch.dtype, device: torch.device) -> None:
        optimizer_class, options = CASES[case]
        options = dict(options)
        self.clip = options.pop("clip", None)
        scaled = options.pop("scaler", False)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0) if scaled else None
        self.lr = None
        if options.pop("lr_tensor", False):
            self.lr = options["lr"] = torch.tensor(1e-2, device=device)
        generator = torch.Generator().manual_seed(0)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
            for shape in SHAPES
        ]
        self.optimizer = optimizer_class(self.params, **options)
        self.device = device
        if self.scaler is not None:
            self.scaler.scale(torch.ones((), device=device))  # makes its scale

    def step(self, grads: list[Tensor | None], lr: float) -> None:
        """One step with ``grads`` of the CPU."""
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        for index, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            param.grad = None if grad is None else self._moved(grad * scale, misaligned=index % 3)
        if self.lr is not None:
            self.lr.fill_(lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        if self.clip is not None:
            self.optimizer.clip_grad_norm_(self.clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _moved(self, grad: Tensor, misaligned: int) -> Tensor:
        memory = torch.empty(grad.numel() + misaligned, dtype=grad.dtype, device=self.device)
        return memory[misaligned:].view(grad.shape).copy_(grad)

    def differs_from(self, other: "Training") -> list[str]:
        """What is not the same, in words."""
        differing = []
        for index, (param, theirs) in enumerate(zip(self.params, other.params, strict=True)):
            if not same_bits(param, theirs):
                differing.append(f"param {index}")
            state = other.optimizer.state[theirs]
            for name, value in self.optimizer.state[param].items():
                if not same_bits(value, state[name]):
                    differing.append(f"{name} of param {index}")
        return differing


def check(report: Report, device: torch.device, clock: Clock, quick: bool) -> None:
    """Every case in every dtype."""
    wrong, late, count = [], [], 0
    for dtype in DTYPES[:2] if quick else DTYPES:
        for case in CASES:
            name = f"{case}, {str(dtype).removeprefix('torch.')}"
            if dtype not in DTYPES_OF.get(case, DTYPES):
                continue
            if clock.left < 0:
                late.append(name)
                continue
            count += 1
            try:
                wrong += [f"{what} ({name})" for what in train_both(case, dtype, device)]
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error} ({name})")
    report.numbers["optimizers"] = {"trainings": count, "wrong": wrong, "late": late}
    if late:
        report.skip(f"{CLAIM} for {listed(late)}", "time was up")
    detail = f"{count} trainings of {STEPS} steps with {len(SHAPES)} params"
    if wrong:
        detail += f", {len(wrong)} differences: {listed(wrong)}"
    report.judge(not wrong and count > 0, CLAIM, detail)


def train_both(case: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What differs after `STEPS` steps, of which some have no gradients for some params."""
    ours, host = Training(case, dtype, device), Training(case, dtype, torch.device("cpu"))
    differing = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        grads: list[Tensor | None] = [
            torch.randn(shape, generator=generator).mul_(0.01).to(dtype) for shape in SHAPES
        ]
        if step in (2, 3):
            grads[1] = grads[4] = None
            grads[100:120] = [None] * 20
        elif step == 4 and ours.scaler is not None:
            grads[2].view(-1)[5] = float("inf")  # all params must skip this step
        for training in (ours, host):
            training.step(grads, lr=1e-2 / (1 + step))
        norms = [training.optimizer.grad_norm for training in (ours, host)]
        # A CPU skips a step before it measures the norm, a GPU after.
        skipped = step == 4 and ours.scaler is not None
        if norms != [None, None] and not skipped and not same_bits(*norms):
            differing.append(f"grad_norm at step {step}")
    if ours.scaler is not None and ours.scaler.get_scale() != host.scaler.get_scale():
        differing.append("the loss scale")
    return differing + ours.differs_from(host)
