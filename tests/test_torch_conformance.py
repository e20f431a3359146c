"""What torch's test suite demands of its optimizers, of ours: construction and steps."""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from conformance import FLAGS, INFOS, KINDS, behaviour, clones, inputs, layer, loss_of, ours, steps


@behaviour
def test_bad_input_is_refused_in_torchs_words(kind):
    errors = INFOS[kind].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(errors) >= 8
    for error in errors:
        given = error.optimizer_error_input
        warned = issubclass(error.error_type, Warning)
        expect = pytest.warns if warned else pytest.raises
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        with expect(error.error_type, match=error.error_regex):
            ours(kind)(given.params, **given.kwargs)


@behaviour
def test_flags_are_refused_together_as_torch_does(kind):
    for flags in itertools.product(
        [None, False, True], [None, False, True], [False, True], [0.1, torch.tensor(0.1)]
    ):
        options = dict(zip(("foreach", "fused", "capturable", "lr"), flags, strict=True))
        if kind == "NAdam":
            del options["fused"]
        try:
            getattr(torch.optim, kind)(layer(), **options)
        except (ValueError, RuntimeError) as error:
            with pytest.raises(type(error), match=re.escape(str(error))):
                ours(kind)(layer(), **options)
        else:
            ours(kind)(layer(), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_differentiable_step_is_refused(kind):
    params = layer()
    optimizer = ours(kind)(params, differentiable=True)
    optimizer.step()  # without gradients there is nothing to differentiate
    params = [p for group in optimizer.param_groups for p in group["params"]]
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        optimizer.step()


def runs_downhill(kind, params, options, make_schedulers) -> None:
    optimizer = ours(kind)(params, **options)
    schedulers = [make(optimizer) for make in make_schedulers]
    before = loss_of(params).item()
    for _ in range(12):
        loss = loss_of(params)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step(*([loss.item()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    after = loss_of(params).item()
    assert after > before if options.get("maximize") else after < before


@behaviour
def test_goes_in_the_right_direction_with_and_without_schedulers(kind):
    for dense, options in itertools.product((True, False), inputs(kind, torch.float32, *FLAGS)):
        runs_downhill(kind, layer(dense=dense), options, ())
    for make_schedulers in INFOS[kind].scheduler_inputs:
        for options in inputs(kind):
            runs_downhill(kind, layer(), options, make_schedulers)


@behaviour
def test_the_same_values_as_torch(kind):
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.float16):
        for options in inputs(kind, dtype):
            # In 16 bits torch rounds after each of some ten operations, and to nothing between.
            narrow = dtype.itemsize == 2
            if dtype == torch.float16:
                options["eps"] = 0.1  # torch's own squares of small gradients are zero
            count, rtol = (1, torch.finfo(dtype).eps) if narrow else (5, None)
            params = layer(dtype)
            copies = clones(params)
            optimizer = ours(kind)(params, **options)
            steps(optimizer, params, count)
            steps(getattr(torch.optim, kind)(copies, **options), copies, count)
            atol = 10 * torch.finfo(dtype).eps * optimizer.param_groups[0]["lr"] if narrow else None
            torch.testing.assert_close(list(params), list(copies), rtol=rtol, atol=atol)


@behaviour
def test_a_tensor_lr_of_any_dimension(kind):
    for dimensions, options in itertools.product(range(3), inputs(kind, torch.float32, *FLAGS)):
        if options.get("foreach") and kind != "NAdam":
            continue  # refused at construction
        params = layer()
        copies = clones(params)
        optimizer = ours(kind)(params, **{**options, "lr": 1e-3})
        lr = torch.tensor(1e-3, dtype=torch.float64).reshape([1] * dimensions)
        other = ours(kind)(copies, **{**options, "lr": lr})
        assert other.param_groups[0]["lr"] is lr
        for rate in (1e-3, 1e-4):
            optimizer.param_groups[0]["lr"] = rate
            lr.fill_(rate)
            steps(optimizer, params, 3)
            steps(other, copies, 3)
            assert all(map(torch.equal, params, copies))


@behaviour
def test_tensor_betas(kind):
    if kind == "NAdam":
        return  # torch's takes floats only
    for first, second in (((), ()), ((1, 1, 1), (1, 1))):
        params = layer()
        copies = clones(params)
        betas = (torch.full(first, 0.5), torch.full(second, 0.75))
        steps(ours(kind)(params, betas=betas), params, 3)
        steps(ours(kind)(copies, betas=(0.5, 0.75)), copies, 3)
        assert all(map(torch.equal, params, copies))


@behaviour
def test_complex_params_are_pairs_of_reals(kind):
    for options in inputs(kind, torch.complex64, "foreach"):
        params = (*layer(torch.complex64), layer()[0])
        reals = [torch.view_as_real(p) if p.is_complex() else p for p in params]
        reals = clones(reals)
        split = clones([part for p in params[:2] for part in (p.real, p.imag)])
        optimizers = [ours(kind)(group, **options) for group in (params, reals, split)]
        for _ in range(3):
            for param, real in zip(params, reals, strict=True):
                param.grad = torch.randn_like(param)
                real.grad = torch.view_as_real(param.grad) if param.is_complex() else param.grad
            for index, part in enumerate(split):
                grad = params[index // 2].grad
                part.grad = (grad.imag if index % 2 else grad.real).clone()
            for optimizer in optimizers:
                optimizer.step()
        for param, real in zip(params, reals, strict=True):
            assert torch.equal(torch.view_as_real(param) if param.is_complex() else param, real)
        for index, part in enumerate(split):
            param = params[index // 2]
            assert torch.equal(param.imag if index % 2 else param.real, part)


@behaviour
def test_flags_change_nothing_also_where_params_come_and_go(kind):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, flag in itertools.product(dtypes, (*FLAGS, "capturable")):
        if flag == "fused" and kind == "NAdam":
            continue
        for options in inputs(kind, dtype):
            models = []
            for value in (False, True):
                torch.manual_seed(1)
                model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1)).to(dtype)
                scalar = nn.Parameter(torch.ones((), dtype=dtype))
                scalar.grad = torch.full_like(scalar, 0.5)
                params = [*model.parameters(), scalar]
                models.append((model, ours(kind)(params, **{**options, flag: value}), params))
            for round in range(7):
                for model, optimizer, _ in models:
                    optimizer.zero_grad()
                    if round in (3, 5):
                        model[2].requires_grad_(round == 5)
                    if round != 2:
                        model(torch.linspace(0.1, 0.6, 6, dtype=dtype).view(3, 2)).sum().backward()
                    optimizer.step()
                (_, one, left), (_, two, right) = models
                for param, other in zip(left, right, strict=True):
                    assert torch.equal(param, other)
                    assert one.state[param].keys() == two.state[other].keys()
                    for name, value in one.state[param].items():
                        assert torch.equal(value, two.state[other][name])
                skipped = [0, 1][round >= 2] + min(max(round - 2, 0), 2)
                assert one.state[left[2]]["step"] == round + 1 - skipped


@behaviour
def test_without_gradients_a_step_does_nothing(kind):
    frozen = [torch.randn(2, 3) for _ in range(2)]
    before = [tensor.clone() for tensor in frozen]
    for options in inputs(kind, torch.float32, *FLAGS):
        optimizer = ours(kind)(frozen, **options)
        assert optimizer.step(lambda: torch.tensor([1.0])) == 1
        assert all(map(torch.equal, frozen, before))
        assert repr(optimizer).startswith(f"{kind} (\nParameter Group 0\n")
        # Zeros are gradients too, but move nothing without weight decay.
        if kind != "AdamW" and not options.get("weight_decay"):
            params = layer()
            copies = clones(params)
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer = ours(kind)(params, **options)
            optimizer.step(lambda: None)
            assert all(map(torch.equal, params, copies))
            assert all(entry["step"] == 1 for entry in optimizer.state.values())


@behaviour
def test_gradients_are_only_read(kind):
    for options in inputs(kind, torch.float32, *FLAGS):
        params = layer()
        optimizer = ours(kind)(params, **options)
        for param in params:
            param.grad = torch.randn_like(param)
        kept = [(param.grad, param.grad.clone(), param.grad._version) for param in params]
        optimizer.step()
        for param, (grad, value, version) in zip(params, kept, strict=True):
            assert param.grad is grad and torch.equal(grad, value) and grad._version == version


@behaviour
def test_every_param_has_state_after_a_step(kind):
    for options in inputs(kind, torch.float32, *FLAGS):
        params = layer()
        optimizer = ours(kind)(params, **options)
        steps(optimizer, params, 1)
        assert set(optimizer.state) == set(params)
        for entry in optimizer.state.values():
            expected = {"step", "exp_avg", "exp_avg_sq"}
            expected |= {"max_exp_avg_sq"} if options.get("amsgrad") else set()
            assert set(entry) == expected | ({"mu_product"} if kind == "NAdam" else set())
            assert entry["step"].dtype == torch.float32 and entry["step"].shape == ()


@behaviour
def test_the_counter_follows_the_default_dtype(kind):
    for default, expected in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        torch.set_default_dtype(default)
        try:
            params = layer(torch.float64)
            optimizer = ours(kind)(params)
            steps(optimizer, params, 2)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(entry["step"].dtype == expected for entry in optimizer.state.values())


@behaviour
def test_zero_grad_as_in_torch(kind):
    for options in ({}, {"foreach": True}):
        params = layer()
        optimizer = ours(kind)(params, **options)
        loss_of(params)
        kept = params[0].grad
        optimizer.zero_grad(set_to_none=False)
        assert params[0].grad is kept and not kept.any()
        factor = torch.ones(1, requires_grad=True)
        params[0].grad = torch.ones(40, 30) * factor  # as create_graph=True leaves them
        optimizer.zero_grad(set_to_none=False)
        assert params[0].grad.grad_fn is None and not params[0].grad.any()
        assert params[0].grad.requires_grad is False
        optimizer.zero_grad()
        assert params[0].grad is None and params[1].grad is None


@behaviour
def test_closures(kind):
    params = layer()
    copies = clones(params)
    optimizer = ours(kind)(params)
    other = getattr(torch.optim, kind)(copies)
    with torch.no_grad():  # a closure has its gradients all the same
        for _ in range(3):
            loss = optimizer.step(lambda: loss_of(params))
            expected = other.step(closure=lambda: loss_of(copies))
            torch.testing.assert_close(loss, expected)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(list(params), list(copies))
    for result in (None, 1.5, (1, 2)):
        assert optimizer.step(lambda result=result: result) == result
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    steps(optimizer, params, 1)


@behaviour
def test_two_loops_of_an_outer_optimizer(kind):
    """A closure may step another optimizer, as it may call this one's zero_grad."""
    params, inner_params = layer(), layer()
    outer, inner = ours(kind)(params), ours(kind)(inner_params)

    def closure():
        outer.zero_grad()
        steps(inner, inner_params, 1)
        return loss_of(params)

    for _ in range(3):
        outer.step(closure)
    assert all(entry["step"] == 3 for o in (outer, inner) for entry in o.state.values())


@behaviour
def test_sparse_gradients_are_refused(kind):
    params = layer()
    copies = clones(params)
    optimizer = ours(kind)(params)
    for param in params:
        param.grad = torch.ones_like(param).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(map(torch.equal, params, copies))


@behaviour
def test_params_on_the_meta_device(kind):
    """An error where torch's fused kernels have one; waited for, where torch steps nothing."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5))
    with pytest.warns(UserWarning, match="param 0 of group 0 is on the meta device"):
        optimizer = ours(kind)(model.parameters())
    optimizer.step()
    for param in model.parameters():
        param.grad = torch.rand_like(param)
    expected = "`fused=True` requires all the params to be floating point Tensors"
    with pytest.raises(RuntimeError, match=expected):
        optimizer.step()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")  # each Parameter stays the object it is
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    params = tuple(model[0].parameters())
    for param in model.parameters():
        nn.init.ones_(param)
    steps(optimizer, params, 2)
    assert optimizer.state[params[0]]["step"] == 2 and (params[0] != 1).any()
    assert set(optimizer.state) == set(model.parameters())
