"""The demo's GPT trained on the GPU, and the optimizer's steps done again on the CPU."""

import copy

import torch
import torch.nn.functional as F

import shardadam
from gpu.checkout import module
from gpu.equal import same_bits
from gpu.report import Clock, Report, listed

corpus_module, gpt = module("examples/corpus.py"), module("examples/gpt.py")

CLAIM = "GPT trained on the GPU equals the CPU's steps on the same gradients"
LAYERS, WIDTH, CONTEXT, BATCH = 2, 128, 128, 8
STEPS = 60
OPTIONS = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0}


def check(report: Report, device: torch.device, clock: Clock, quick: bool) -> None:
    """In fp32 and in bf16."""
    text = corpus_module.standard_library()
    report.numbers["gpt"] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        losses, wrong = train(text, dtype, device, clock, 15 if quick else STEPS)
        report.numbers["gpt"][name] = {"losses": losses, "wrong": wrong}
        if not losses:
            report.skip(f"{CLAIM} ({name})", "time was up")
            continue
        detail = f"{len(losses)} steps, loss {losses[0]:.2f} to {losses[-1]:.2f} nats"
        if wrong:
            detail += f", {len(wrong)} differences: {listed(wrong)}"
        learns = len(losses) < 10 or losses[-1] < losses[0]
        report.judge(not wrong and learns, f"{CLAIM} ({name})", detail)


def train(
    text: object, dtype: torch.dtype, device: torch.device, clock: Clock, steps: int
) -> tuple[list[float], list[str]]:
    """The losses, and the names of the params that differ at the end."""
    torch.manual_seed(0)
    host = gpt.GPT(LAYERS, WIDTH, CONTEXT).to(dtype)
    model = copy.deepcopy(host).to(device)
    ours = shardadam.AdamW(model.named_parameters(), **OPTIONS)
    theirs = shardadam.AdamW(host.named_parameters(), **OPTIONS)
    losses: list[float] = []
    wrong: list[str] = []
    reserve = clock.left / 2 if dtype == torch.float32 else 0.0  # for the other dtype
    for step in range(steps):
        if clock.left < reserve:
            break
        inputs, targets = (part.to(device) for part in text.batch(0, step, BATCH, CONTEXT))
        loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
        loss.backward()
        losses.append(loss.item())
        for param, other in zip(model.parameters(), host.parameters(), strict=True):
            other.grad = None if param.grad is None else param.grad.cpu()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 5, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if not same_bits(ours.grad_norm, theirs.grad_norm):
            wrong.append(f"grad_norm at step {step}")
    parameters = zip(model.named_parameters(), host.parameters(), strict=True)
    wrong += [name for (name, param), other in parameters if not same_bits(param, other)]
    return losses, wrong
