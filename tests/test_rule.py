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
    "Adam, L2, maximize": ("Adam", {"maximize": True, "weight_decay": 0.1}),
    "Adam, decoupled": ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "AMSGrad": ("Adam", {"amsgrad": True}),
    "AMSGrad, L2": ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW": ("AdamW", {}),
    "AdamW, maximize": ("AdamW", {"maximize": True}),
    "AdamW, AMSGrad": ("AdamW", {"amsgrad": True}),
    "NAdam": ("NAdam", {}),
    "NAdam, maximize": ("NAdam", {"maximize": True}),
    "NAdam, L2": ("NAdam", {"weight_decay": 0.1}),
    "NAdam, decoupled": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
}


def ulp(value: Tensor) -> Tensor:
    """The distance to the next float32."""
    value = value.abs().float()
    return (value.nextafter(torch.tensor(float("inf"))) - value).double()


def textbook(kind: str, group: dict, t: int, p: Tensor, g: Tensor, state: dict) -> dict:
    """What a step gives in float64, as torch.optim documents it, and the size of each's terms."""
    (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    size_p = p.abs().clamp(min=lr)
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
    size_m = torch.maximum((b1 * state["exp_avg"].double()).abs(), (1 - b1) * size)
    size_v = torch.maximum(b2 * v, (1 - b2) * size * size)
    v = b2 * v + (1 - b2) * g * g
    top, size_top = v, size_v
    if group.get("amsgrad"):
        top = torch.maximum(v, state["max_exp_avg_sq"].double())
        size_top = torch.maximum(size_v, top)
    root = (top / (1 - b2**t)).sqrt() + EPS
    if kind == "NAdam":
        mu, after = (b1 * (1 - 0.5 * 0.96 ** (n * group["momentum_decay"])) for n in (t, t + 1))
        product = float(state["mu_product"].item() * torch.tensor(mu, dtype=FP64))
        p = p - lr * (1 - mu) / (1 - product) * g / root
        p = p - lr * after / (1 - product * after) * m / root
    else:
        p = p - lr * (m / (1 - b1**t)) / root
    return {
        "param": (p, size_p),
        "exp_avg": (m, size_m),
        "exp_avg_sq": (v, size_v),
        "max_exp_avg_sq": (top, size_top),
    }


def worst_errors(package, kind: str, options: dict, lr: float) -> dict[str, float]:
    """Of params and moments over 20 steps, each judged from its own float32 state, in ulp."""
    numel = 30_000
    generator = torch.Generator().manual_seed(0)

    def randn(size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def magnitudes(size: int) -> Tensor:
        return 10 ** (torch.rand(size, generator=generator) * 24 - 12)

    start = torch.cat([torch.zeros(numel), randn(numel) * lr, randn(numel)])
    param = torch.nn.Parameter(start.clone())
    if package is torch.optim:
        options = {**options, "foreach": False}
    optimizer = getattr(package, kind)([param], lr=lr, **options)
    group = {"decoupled_weight_decay": kind == "AdamW", **optimizer.param_groups[0]}
    zero = {name: torch.zeros_like(start) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    state = {**zero, "mu_product": torch.tensor(1.0)}
    scale = magnitudes(3 * numel)
    worst = dict.fromkeys(("param", *zero), 0.0)
    for t in range(1, 21):
        # Half of the gradients keep their magnitude, half leap from step to step.
        scale[::2] = magnitudes(3 * numel // 2)
        before = param.detach().clone()
        param.grad = randn(3 * numel) * scale
        exact = textbook(kind, group, t, before, param.grad, state)
        optimizer.step()
        state = {name: value.clone() for name, value in optimizer.state[param].items()}
        assert state["step"].item() == t
        for name, found in {"param": param.detach(), **state}.items():
            if name in worst:
                value, size = exact[name]
                error = ((found.double() - value).abs() / ulp(size)).max().item()
                worst[name] = max(worst[name], error)
    return worst


@pytest.mark.parametrize("lr", [1e-3, 1.95e-3, 3e-4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_is_within_two_ulp(variant, lr):
    kind, options = VARIANTS[variant]
    ours = worst_errors(shardadam, kind, options, lr)
    theirs = worst_errors(torch.optim, kind, options, lr)
    # One rounding of each. That of a moment is half an ulp, one where a sum is in the binade above
    # its largest term. In 20 steps a gradient that leaps moves a param by up to 3 lr: that is two
    # binades above the larger of it and lr, where half an ulp is two.
    bounds = {"param": 2.0, "exp_avg": 1.0, "exp_avg_sq": 1.0, "max_exp_avg_sq": 1.0}
    for name, bound in bounds.items():
        message = f"{name}: shardadam {ours[name]:.2f} ulp, torch {theirs[name]:.2f} ulp"
        assert ours[name] <= bound, message
        assert ours[name] <= theirs[name], message


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hundred_steps_beside_torch(variant):
    kind, options = VARIANTS[variant]
    generator = torch.Generator().manual_seed(1)
    # About 1, about lr, and zero.
    start = torch.randn(6_000, generator=generator)
    start[2_000:] *= 1e-3
    start[4_000:] = 0.0
    params, optimizers, schedulers = [], [], []
    for package in (shardadam, torch.optim):
        params.append(torch.nn.Parameter(start.clone()))
        optimizers.append(getattr(package, kind)([params[-1]], lr=1e-3, **options))
        schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], 100))
    ours, theirs = (param.detach() for param in params)
    largest = start.abs().clamp(min=1e-3)
    for _ in range(100):
        grad = torch.randn(6_000, generator=generator)
        for param, optimizer, scheduler in zip(params, optimizers, schedulers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
            scheduler.step()
        largest = torch.maximum(largest, theirs.abs())
    # Per step, 2 ulp of max(|p|, lr) for ours and 8 for torch's (measured as above, where nothing
    # cancels) add up at worst; what the state and L2 decay feed back is of second order.
    assert ((ours - theirs).abs().double() / ulp(largest)).max().item() <= 100 * (2 + 8)
