"""What torch's test suite demands of its optimizers, of ours: what is hooked to a step."""

import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from conformance import FLAGS, KINDS, behaviour, clones, inputs, layer, loss_of, ours, steps


@behaviour
def test_hooks_of_one_optimizer_and_of_all(kind):
    for options in inputs(kind, torch.float32, *FLAGS):
        params = [torch.tensor([1.0, 1.0])]
        optimizer, sgd = ours(kind)(params, **options), torch.optim.SGD(params)
        calls = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_, calls=calls: calls.append(0)),
            register_optimizer_step_post_hook(lambda *_, calls=calls: calls.append(5)),
        ]
        for hooked in (optimizer, sgd):
            handles += [
                hooked.register_step_pre_hook(lambda *_, calls=calls: calls.append(1)),
                hooked.register_step_post_hook(lambda *_, calls=calls: calls.append(2)),
            ]
        for expected, stepped in enumerate((optimizer, sgd, optimizer), 1):
            stepped.step()
            assert calls == [0, 1, 2, 5] * expected
        for handle in handles:
            handle.remove()
        optimizer.step()
        sgd.step()
        assert calls == [0, 1, 2, 5] * 3


@behaviour
def test_a_pre_hook_may_change_the_arguments(kind):
    params = layer()
    optimizer = ours(kind)(params)
    seen = []
    handle = optimizer.register_step_pre_hook(
        lambda stepped, args, kwargs: ((args[0], lambda: "another"), {})
    )
    optimizer.register_step_post_hook(lambda stepped, args, kwargs: seen.append((stepped, kwargs)))
    assert optimizer.step(lambda: "mine") == "another"
    assert seen == [(optimizer, {})]
    handle.remove()
    optimizer.register_step_pre_hook(lambda *_: "nonsense")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    assert len(seen) == 1


@behaviour
def test_hooks_may_look_at_gradients_and_params(kind):
    params = layer()
    optimizer = ours(kind)(params)

    def halve(stepped, args, kwargs):
        for group in stepped.param_groups:
            for param in group["params"]:
                param.grad.mul_(0.5)

    optimizer.register_step_pre_hook(halve)
    counts = []
    optimizer.register_step_post_hook(
        lambda o, *_: counts.append(o.state[params[0]]["step"].item())
    )
    copies = clones(params)
    other = ours(kind)(copies)
    for _ in range(2):
        loss_of(params)
        optimizer.step()
        loss_of(copies)
        halve(other, (), {})
        other.step()
    assert counts == [1, 2]
    assert all(map(torch.equal, params, copies))


@behaviour
def test_the_profiler_sees_steps_and_zero_grad(kind):
    params = layer()
    optimizer = ours(kind)(params)
    with torch.autograd.profiler.profile() as profile:
        loss_of(params)
        optimizer.step()
        optimizer.step(lambda: loss_of(params))
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    assert names.count(f"Optimizer.step#{kind}.step") == 2
    assert names.count(f"Optimizer.zero_grad#{kind}.zero_grad") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_step_code_is_called_after_every_step(kind, monkeypatch):
    params = layer()
    optimizer = ours(kind)(params)
    calls = []
    monkeypatch.setattr(type(optimizer), "_optimizer_step_code", lambda self: calls.append(self))
    optimizer.step()
    assert calls == [optimizer]


@behaviour
def test_subclasses(kind):
    hooked = {}
    for base in (ours(kind), getattr(torch.optim, kind)):
        base(layer())  # torch puts the hooks into a class at its first construction

        class Overrides(base):
            def step(self, closure=None):
                self.calls = getattr(self, "calls", 0) + 1
                return super().step(closure)

        class Inherits(base):
            pass

        for make in (Overrides, Inherits):
            params = layer()
            optimizer = make(params)
            calls = hooked.setdefault((base, make.__name__), [])
            optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append(1))
            steps(optimizer, params, 2)
            assert getattr(optimizer, "calls", None) == (2 if make is Overrides else None)
            assert repr(optimizer).startswith(make.__name__)
    assert len({tuple(calls) for (_, name), calls in hooked.items() if name == "Overrides"}) == 1
    assert len({tuple(calls) for (_, name), calls in hooked.items() if name == "Inherits"}) == 1


@behaviour
def test_schedulers_wrap_and_watch_the_step(kind):
    params = layer()
    optimizer = ours(kind)(params, lr=0.5)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "gradients are equal on all ranks")
        steps(optimizer, params, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    late = ours(kind)(layer())
    schedule = lr_scheduler.StepLR(late, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step\\(\\)` before `optimizer.step"):
        schedule.step()


@behaviour
def test_a_scheduler_fills_a_tensor_lr(kind):
    params = layer()
    lr = torch.tensor(0.5)
    optimizer = ours(kind)(params, lr=lr)
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
            lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2),
        ],
        milestones=[2],
    )
    copies = clones(params)
    other = ours(kind)(copies)
    for _ in range(7):
        other.param_groups[0]["lr"] = lr.item()
        steps(optimizer, params, 1)
        steps(other, copies, 1)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr
    assert all(map(torch.equal, params, copies))


@behaviour
def test_cyclic_rates_move_beta1(kind):
    params = layer()
    optimizer = ours(kind)(params, lr=1e-3)
    scheduler = lr_scheduler.CyclicLR(
        optimizer, 1e-3, 1e-2, step_size_up=2, base_momentum=0.5, max_momentum=0.7
    )
    for expected in (0.7, 0.6, 0.5, 0.6):
        assert optimizer.param_groups[0]["betas"][0] == pytest.approx(expected)
        steps(optimizer, params, 1)
        scheduler.step()


@behaviour
def test_averaged_models(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40))
    optimizer = ours(kind)(model.parameters())
    averaged = swa_utils.AveragedModel(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 30)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    swa_utils.update_bn([torch.randn(4, 30)], averaged)
    assert averaged.n_averaged == 3
    assert averaged.module[0].weight.shape == (40, 30)


@behaviour
def test_optimizers_are_freed(kind):
    params = layer()
    optimizer = ours(kind)(params)
    steps(optimizer, params, 1)
    optimizer.state_dict()
    optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    gone = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert gone() is None, "no reference cycle"
    finally:
        gc.enable()


@behaviour
def test_a_compiled_step_runs(kind):
    """A compiled wrapper does what the plain step does: Dynamo is kept out of it."""
    params = layer()
    copies = clones(params)
    optimizer, other = ours(kind)(params), ours(kind)(copies)

    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    @torch.compile(backend=backend)
    def step():
        optimizer.step()

    for _ in range(2):
        loss_of(params)
        step()
        steps(other, copies, 1)
    assert all(map(torch.equal, params, copies))
    # At most torch's own profiler mark is traced.
    assert all("profiler" in name or name == "output" for name in seen), seen
