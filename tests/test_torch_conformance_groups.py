"""What torch's test suite demands of its optimizers, of ours: param groups."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import shardadam
from conformance import FLAGS, INFOS, behaviour, clones, inputs, layer, loss_of, ours, steps


@behaviour
def test_groups_of_their_own_with_schedulers(kind):
    for make_schedulers in INFOS[kind].scheduler_inputs:
        params = layer()
        optimizer = ours(kind)([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}])
        schedulers = [make(optimizer) for make in make_schedulers]
        before = loss_of(params).item()
        for _ in range(20):
            loss = optimizer.step(lambda params=params: loss_of(params))
            for scheduler in schedulers:
                scheduler.step(*([loss.item()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert loss_of(params).item() < before


@behaviour
def test_groups_with_weight_decays_and_rates_of_their_own(kind):
    for options in inputs(kind, torch.float32, *FLAGS):
        params = layer()
        irrelevant = nn.Parameter(torch.randn(2))
        before = irrelevant.detach().clone()
        groups = [
            {"params": [params[0]], **options},
            {"params": [params[1]], **{**options, "weight_decay": 0.0}},
            {"params": [irrelevant], "lr": 1e-28},
        ]
        optimizer = ours(kind)(groups, lr=1e-3)
        losses = []
        for _ in range(20):
            losses.append(loss_of(params).item())
            irrelevant.grad = torch.rand_like(irrelevant)
            optimizer.step()
        assert losses[-1] > losses[0] if options.get("maximize") else losses[-1] < losses[0]
        assert torch.equal(irrelevant, before)


@behaviour
def test_hyperparameters_are_read_anew_at_every_step(kind):
    params = layer()
    copies = clones(params)
    pair = [(package.__dict__[kind], group) for package, group in
            ((shardadam, params), (torch.optim, copies))]  # fmt: skip
    optimizers = [make(group, lr=0.1) for make, group in pair]
    changes = {
        "lr": 1e-3,
        "betas": (0.5, 0.6),
        "eps": 1e-3,
        "weight_decay": 0.3,
        "maximize": True,
        **({"momentum_decay": 0.1} if kind == "NAdam" else {"amsgrad": False}),
        **({} if kind == "AdamW" else {"decoupled_weight_decay": True}),
    }
    for name, value in changes.items():
        for optimizer, (_, group) in zip(optimizers, pair, strict=True):
            optimizer.param_groups[0][name] = value
            steps(optimizer, group, 2)
        torch.testing.assert_close(list(params), list(copies))


@behaviour
def test_param_groups_are_added_as_in_torch(kind):
    weight, bias = layer()
    optimizer = ours(kind)([weight], lr=0.5)
    optimizer.defaults["lr"] = 0.25
    optimizer.add_param_group({"params": bias, "weight_decay": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert optimizer.param_groups[1]["params"] == [bias]
    assert optimizer.param_groups[0].keys() == optimizer.param_groups[1].keys()
    for group, error, message in (
        ([bias], TypeError, "param_group must be a dict"),
        ({"params": {nn.Parameter(torch.ones(1))}}, TypeError, "ordered collections"),
        ({"params": [1]}, TypeError, "can only optimize Tensors"),
        ({"params": [bias]}, ValueError, "more than one parameter group"),
        ({"params": [weight * 2]}, ValueError, "non-leaf"),
        ({"params": [("name", nn.Parameter(torch.ones(1)))]}, ValueError, "without names"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 2
    before = [tensor.detach().clone() for tensor in (weight, bias)]
    steps(optimizer, (weight, bias), 2)
    assert not any(map(torch.equal, before, (weight, bias)))
    named = ours(kind)([("weight", nn.Parameter(torch.ones(3)))])
    named.add_param_group({"params": [("bias", nn.Parameter(torch.ones(3)))]})
    assert [group["param_names"] for group in named.param_groups] == [["weight"], ["bias"]]
    with pytest.raises(ValueError, match="should be with/without names"):
        named.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@behaviour
def test_params_in_any_iterable(kind):
    params = layer()
    for given in (
        iter(params),
        tuple(params),
        ({"params": param} for param in params),
        [{"params": iter(params), "lr": 0.1}],
        dict(zip("ab", params, strict=True)).items(),
    ):
        optimizer = ours(kind)(given)
        assert [p for group in optimizer.param_groups for p in group["params"]] == list(params)
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match="empty parameter list"):
            ours(kind)(empty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = ours(kind)([params[0], params[0], params[1]])
    steps(twice, params, 1)
    packed = twice.state_dict()
    assert packed["param_groups"][0]["params"] == [1, 1, 2] and list(packed["state"]) == [1, 2]
    twice.load_state_dict(packed)


@behaviour
def test_deepcopied_options_are_not_shared(kind):
    options = {"lr": 0.1, "betas": (0.5, 0.9)}
    optimizer = ours(kind)(layer(), **options)
    defaults = copy.deepcopy(optimizer.defaults)
    optimizer.param_groups[0]["lr"] = 0.7
    assert optimizer.defaults == defaults and options == {"lr": 0.1, "betas": (0.5, 0.9)}
