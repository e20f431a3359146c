"""The accuracy of one step against the textbook in float64; and 100 steps beside torch."""

import pytest
import torch
from torch import Tensor

import shardadam

FP64 = torch.float64
BETAS, EPS = (0.9, 0.999), 1e-8
VARIANTS = {
    "Adam": ("Adam", {}),
    "Adam, L2": ("Adam", {"weight_decay": 0.1}),
    "Adam, maximize": ("Adam", {"maximize": True, "weight_decay": 0.1}),
    "AMSGrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {}),
    "AdamW, AMSGrad": ("AdamW", {"amsgrad": True}),
    "NAdam": ("NAdam", {}),
    "NAdam, L2": ("NAdam", {"weight_decay": 0.1}),
    "NAdam, decoupled": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
}


def ulp(value: Tensor) -> Tensor:
    """The distance to the next float32."""
    value = value.abs().float()
    return (value.nextafter(torch.tensor(float("inf"))) - value).double()


def textbook(kind: str, group: dict, t: int, p: Tensor, g: Tensor, state: dict) -> tuple:
    """One step in float64, as torch.optim documents it; with the size of the moments' terms."""
    (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    p, g, m, v = p.double(), g.double(), state["exp_avg"].double(), state["exp_avg_sq"].double()
    g = -g if group["maximize"] else g
    decoupled = group["decoupled_weight_decay"]
    # What L2 decay adds may cancel the gradient: the error is of the size of what cancels.
    size = g.abs() if decoupled else g.abs() + decay * p.abs()
    if decoupled:
        p = p * (1 - lr * decay)
    else:
        g = g + decay * p
    m = b1 * m + (1 - b1) * g
    terms_m = torch.maximum((b1 * state["exp_avg"].double()).abs(), (1 - b1) * size)
    terms_v = torch.maximum(b2 * v, (1 - b2) * size * size)
    v = b2 * v + (1 - b2) * g * g
    top = v
    if group.get("amsgrad"):
        top = torch.maximum(v, state["max_exp_avg_sq"].double())
    root = (top / (1 - b2**t)).sqrt() + EPS
    if kind == "NAdam":
        mu, after = (b1 * (1 - 0.5 * 0.96 ** (n * group["momentum_decay"])) for n in (t, t + 1))
        product = float(state["mu_product"].item() * torch.tensor(mu, dtype=FP64))
        p = p - lr * (1 - mu) / (1 - product) * g / root
        p = p - lr * after / (1 - product * after) * m / root
    else:
        p = p - lr * (m / (1 - b1**t)) / root
    return p, m, v, terms_m, terms_v


def worst_errors(package, kind: str, options: dict, lr: float) -> tuple[float, float, float]:
    """Over 20 steps, each judged from its own float32 state: param, exp_avg, exp_avg_sq, in ulp."""
    numel = 30_000
    generator = torch.Generator().manual_seed(0)

    def randn() -> Tensor:
        return torch.randn(numel, generator=generator)

    start = torch.cat([torch.zeros(numel), randn() * lr, randn()])
    magnitude = 10 ** (torch.rand(3 * numel, generator=generator) * 24 - 12)
    param = torch.nn.Parameter(start.clone())
    if package is torch.optim:
        options = {**options, "foreach": False}
    optimizer = getattr(package, kind)([param], lr=lr, **options)
    zero = {name: torch.zeros_like(start) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    state = {**zero, "mu_product": torch.tensor(1.0)}
    worst = [0.0, 0.0, 0.0]
    for t in range(1, 21):
        before = param.detach().clone()
        param.grad = torch.randn(3 * numel, generator=generator) * magnitude
        group = optimizer.param_groups[0]
        group.setdefault("decoupled_weight_decay", kind == "AdamW")
        exact = textbook(kind, group, t, before, param.grad, state)
        optimizer.step()
        state = {name: value.clone() for name, value in optimizer.state[param].items()}
        unit = ulp(torch.maximum(before.abs(), torch.tensor(lr)))
        found = [
            ((param.detach().double() - exact[0]).abs() / unit).max().item(),
            ((state["exp_avg"].double() - exact[1]).abs() / ulp(exact[3])).max().item(),
            ((state["exp_avg_sq"].double() - exact[2]).abs() / ulp(exact[4])).max().item(),
        ]
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
    return tuple(worst)


@pytest.mark.parametrize("lr", [1e-3, 1.95e-3, 3e-4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_is_within_two_ulp(variant, lr):
    kind, options = VARIANTS[variant]
    param, exp_avg, exp_avg_sq = worst_errors(shardadam, kind, options, lr)
    # One rounding of each: half an ulp, one where a sum is in the binade above its largest term.
    assert exp_avg <= 1.0
    assert exp_avg_sq <= 1.0
    assert param <= 2.0
    theirs = worst_errors(torch.optim, kind, options, lr)
    assert param <= theirs[0], f"shardadam {param:.2f} ulp, torch {theirs[0]:.2f} ulp"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hundred_steps_beside_torch(variant):
    kind, options = VARIANTS[variant]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(5_000, generator=generator)
    params, optimizers, schedulers = [], [], []
    for package in (shardadam, torch.optim):
        params.append(torch.nn.Parameter(start.clone()))
        optimizers.append(getattr(package, kind)([params[-1]], lr=1e-3, **options))
        schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], 100))
    for _ in range(100):
        grad = torch.randn(5_000, generator=generator)
        for param, optimizer, scheduler in zip(params, optimizers, schedulers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
            scheduler.step()
    ours, theirs = (param.detach() for param in params)
    # Torch's step is off by up to 6 ulp of max(|p|, lr), which here is at most that of 4; over 100
    # steps errors add up at worst, and what L2 decay feeds back is of second order.
    assert (ours - theirs).abs().max().item() <= 100 * 6 * ulp(torch.tensor(3.9)).item()
    relative = (ours - theirs).abs() / torch.maximum(ours.abs(), torch.tensor(1e-3))
    assert relative.median().item() < 1e-6
