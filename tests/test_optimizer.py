"""One process: what users of torch.optim expect, holds."""

import copy
import inspect
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import shardadam
from models import loss_of, mlp, same, train, values

KINDS = ["Adam", "AdamW", "NAdam"]


def pair(kind: str, params: list, **options) -> tuple:
    """Our optimizer on ``params`` and torch's on copies of them."""
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    ours = getattr(shardadam, kind)(params, **options)
    return ours, getattr(torch.optim, kind)(copies, **options), copies


def step_both(ours, theirs, params, copies, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param, other in zip(params, copies, strict=True):
        grad = torch.randn(param.shape, generator=generator, dtype=torch.complex128)
        grad = grad if param.is_complex() else grad.real
        param.grad = grad.to(param.dtype).clone(memory_format=torch.contiguous_format)
        other.grad = param.grad.clone()
    ours.step()
    theirs.step()


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_begin_as_torchs(kind):
    ours = inspect.signature(getattr(shardadam, kind)).parameters
    theirs = inspect.signature(getattr(torch.optim, kind)).parameters
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    optimizer = getattr(shardadam, kind)([nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, getattr(torch.optim, kind))


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable"])
def test_flags_of_torchs_implementations_change_nothing(flag):
    models = [mlp(), mlp()]
    for model, options in zip(models, ({}, {flag: True}), strict=True):
        train(model, shardadam.AdamW(model.parameters(), **options), range(3))
    assert same(*map(values, models))


@pytest.mark.parametrize("kind", KINDS)
def test_params_of_every_shape_stride_and_dtype(kind):
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(70, 50).t()),
        nn.Parameter(torch.randn(20, 6)[:, ::2]),
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.randn(30, 3, dtype=torch.complex64)),
        nn.Parameter(torch.randn(3, dtype=torch.complex128)),
        nn.Parameter(torch.randn(300, dtype=torch.float64)),
    ]
    strides = [param.stride() for param in params]
    ours, theirs, copies = pair(kind, params)
    for seed in range(5):
        step_both(ours, theirs, params, copies, seed)
    for index, (param, other) in enumerate(zip(params, copies, strict=True)):
        # 5 steps, each off by a few ulp of max(|p|, lr) < 8.
        torch.testing.assert_close(param, other, rtol=0, atol=2e-5)
        if index != 2:  # a slice is not dense: it becomes contiguous
            assert param.stride() == strides[index]
        shown = ours.state[param]["exp_avg"]
        assert shown.shape == param.shape and shown.dtype == param.dtype


def test_params_are_views_that_are_written_in_place():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    assert len({param.untyped_storage().data_ptr() for param in model.parameters()}) == 1
    addresses = [param.data_ptr() for param in model.parameters()]
    train(model, optimizer, range(2))
    assert addresses == [param.data_ptr() for param in model.parameters()]


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "ExponentialLR": {"gamma": 0.8},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "OneCycleLR": {"max_lr": 0.01, "total_steps": 10},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-2, "cycle_momentum": False},
    "LinearLR": {},
    "ConstantLR": {},
    "PolynomialLR": {},
    "MultiStepLR": {"milestones": [2, 4]},
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "ReduceLROnPlateau": {"patience": 0},
}
# Made of two of the others.
COMPOSITES = {
    "SequentialLR": lambda optimizer, pair: lr_scheduler.SequentialLR(optimizer, pair, [3]),
    "ChainedScheduler": lambda optimizer, pair: lr_scheduler.ChainedScheduler(pair),
}
OTHERS = {
    "CyclicLR, betas too": lambda optimizer: lr_scheduler.CyclicLR(
        optimizer, 1e-4, 1e-2, step_size_up=3
    ),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 1e-2, anneal_epochs=4),
}


def make_scheduler(name: str, optimizer: torch.optim.Optimizer):
    if name in OTHERS:
        return OTHERS[name](optimizer)
    if name in COMPOSITES:
        pair = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.8)]
        return COMPOSITES[name](optimizer, pair)
    return getattr(lr_scheduler, name)(optimizer, **SCHEDULERS[name])


def test_no_scheduler_is_left_out():
    theirs = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert theirs - {"LRScheduler", "_LRScheduler"} == {*SCHEDULERS, *COMPOSITES}


@pytest.mark.parametrize("name", [*SCHEDULERS, *COMPOSITES, *OTHERS])
def test_schedulers_drive_it(name):
    models, rates = [mlp(), mlp()], ([], [])
    for model, package, seen in zip(models, (shardadam, torch.optim), rates, strict=True):
        optimizer = package.AdamW(model.parameters(), lr=1e-3)
        scheduler = make_scheduler(name, optimizer)
        for step in range(8):
            train(model, optimizer, range(step, step + 1))
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append([optimizer.param_groups[0][key] for key in ("lr", "betas")])
    assert rates[0] == rates[1]
    for left, right in zip(*map(values, models), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_a_tensor_lr_and_groups_of_their_own():
    models = [mlp(), mlp()]
    for model, package in zip(models, (shardadam, torch.optim), strict=True):
        optimizer = package.AdamW(
            [
                {"params": model[0].parameters(), "lr": torch.tensor(1e-2), "betas": (0.8, 0.99)},
                {"params": [model[2].weight], "weight_decay": 0.5, "eps": 1e-4},
                {"params": [model[2].bias, *model[4].parameters()], "amsgrad": True},
            ],
            lr=1e-3,
        )
        train(model, optimizer, range(3))
        optimizer.param_groups[0]["lr"].fill_(1e-4)
        train(model, optimizer, range(3, 6))
    for left, right in zip(*map(values, models), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_closures_hooks_and_zero_grad():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, packed: {**packed, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, packed: calls.append(packed["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))

    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after"] * 2 + [1, "loaded"]
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in model.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_unused_frozen_and_tied_params():
    model = mlp()
    model.tied = model[4].weight
    model[0].bias.requires_grad_(False)
    optimizer = shardadam.AdamW(model.parameters())
    before = copy.deepcopy(model)
    loss_of(model, 0).backward()
    model[2].bias.grad = None
    optimizer.step()
    assert torch.equal(model[2].bias, before[2].bias)
    assert torch.equal(model[0].bias, before[0].bias)
    assert optimizer.state[model[2].bias]["step"] == 0
    assert optimizer.state[model[2].weight]["step"] == 1
    assert model[0].bias not in optimizer.state
    assert model.tied is model[4].weight
    model[0].bias.requires_grad_(True)
    train(model, optimizer, range(2))
    assert optimizer.state[model[0].bias]["step"] == 2
    assert not torch.equal(model[0].bias, before[0].bias)


def test_amsgrad_switched_on_later():
    model = mlp()
    optimizer = shardadam.Adam(model.parameters())
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["amsgrad"] = True
    train(model, optimizer, range(2))
    state = optimizer.state[model[0].weight]
    assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    list(itertools.product(KINDS, [torch.float32, torch.bfloat16, torch.float16])),
)
def test_deepcopy_and_pickle_carry_params_and_state(kind, dtype):
    model = mlp(dtype)
    optimizer = getattr(shardadam, kind)(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for trained, by in ((model, optimizer), copied, pickled):
        train(trained, by, range(3, 6))
    assert same(values(model), values(copied[0]))
    assert same(values(model), values(pickled[0]))


def test_bfloat16_keeps_updates_that_are_below_its_resolution():
    param = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = shardadam.AdamW([param], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        optimizer.step()
    # 100 steps of 1e-4; one is a thirtieth of half an ulp of 1, and would be rounded away.
    assert param.float().mean().item() == pytest.approx(0.99, abs=2**-9)
    assert optimizer.state[param]["remainder"].dtype == torch.int16


def test_the_mean_of_gradients_read_in_place_needs_no_copy():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), grad_sync="none")
    train(model, optimizer, range(2))
    other = mlp()
    train(other, shardadam.AdamW(other.parameters()), range(2))
    assert same(values(model), values(other))


def test_repr_says_what_runs():
    text = repr(shardadam.AdamW(mlp().parameters()))
    assert "rank 0 of 1 (none), grad_sync='mean', 1 buckets of float32 params with fp32" in text
    assert "update by compiled CPU twin (" in text
    assert "lr: 0.001" in text
    params = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    text = repr(shardadam.AdamW(params, state="q8", master="split8", shard_grads=True))
    assert "sharded in backward, 2 buckets of " in text
    assert "bfloat16 params with q8 moments and master='split8'" in text
    assert "of float32 params with q8 moments" in text


def test_gradients_that_are_lazily_conjugated_negated_or_expanded():
    params = [nn.Parameter(torch.ones(4, dtype=torch.complex64)), nn.Parameter(torch.ones(4))]
    params.append(nn.Parameter(torch.ones(4)))
    ours, theirs, copies = pair("Adam", params, lr=0.1)
    grads = [torch.full((4,), 1 + 2j).conj(), torch._neg_view(torch.ones(4))]
    grads.append(torch.ones(1).expand(4))  # one number in memory
    assert grads[0].is_conj() and grads[1].is_neg()
    for param, other, grad in zip(params, copies, grads, strict=True):
        param.grad, other.grad = grad, grad.resolve_conj().resolve_neg().clone()
    ours.step()
    theirs.step()
    for param, other in zip(params, copies, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=0)


def test_the_optimizer_lets_go_of_gradients():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    loss_of(model, 0).backward()
    grad = weakref.ref(model[0].weight.grad)
    optimizer.step()
    optimizer.zero_grad()
    assert grad() is None


@pytest.mark.parametrize("package", [torch.optim, shardadam], ids=lambda package: package.__name__)
def test_backward_through_a_step_is_an_error(package):
    """A kernel that writes raw memory must tell autograd, or gradients are silently wrong."""
    model = mlp()
    optimizer = package.AdamW(model.parameters())
    before_the_step = loss_of(model, 0)
    train(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before_the_step.backward()


def test_tied_params_are_updated_once():
    models = [mlp(), mlp()]
    for model, package in zip(models, (shardadam, torch.optim), strict=True):
        model[4].weight = nn.Parameter(torch.ones(65, 65))
        model[4].bias = model[2].bias
        model.append(nn.Linear(65, 65, bias=False))
        model[5].weight = model[4].weight
        optimizer = package.AdamW(model.parameters())
        train(model, optimizer, range(3))
        assert model[5].weight is model[4].weight and model[4].bias is model[2].bias
        assert optimizer.state[model[5].weight]["step"] == 3
    for left, right in zip(*map(values, models), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_a_param_that_is_listed_twice_is_updated_once():
    param, once = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = shardadam.Adam([param, param])
    other = shardadam.Adam([once])
    param.grad = once.grad = torch.ones(3)
    optimizer.step()
    other.step()
    assert torch.equal(param, once)
