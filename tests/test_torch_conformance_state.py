"""What torch's test suite demands of its optimizers, of ours: state dicts, copies, pickles."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from conformance import (
    FLAGS,
    INFOS,
    KINDS,
    behaviour,
    clones,
    equal,
    inputs,
    layer,
    loss_of,
    ours,
    steps,
)

# What a dict of torch 1.x may lack.
LATER_KEYS = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
    "amsgrad": False,
}


def named(params, yes: bool):
    return [(f"name{i}", param) for i, param in enumerate(params)] if yes else list(params)


def unnamed(packed: dict) -> dict:
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in packed["param_groups"]]
    return {**packed, "param_groups": groups}


def trained(kind: str, count: int = 3, **options) -> tuple:
    params = layer()
    optimizer = ours(kind)(params, **options)
    steps(optimizer, params, count)
    return params, optimizer


def through_a_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@behaviour
def test_equal_runs_have_equal_state_dicts(kind):
    for first, second in itertools.product((False, True), repeat=2):
        for options in inputs(kind, torch.float32, *FLAGS):
            params = layer()
            optimizer = ours(kind)(named(params, first), **options)
            steps(optimizer, params, 3)
            others = clones(params)
            other = ours(kind)(named(others, second), **options)
            saved = copy.deepcopy(optimizer.state_dict())
            given = copy.deepcopy(saved)
            other.load_state_dict(given)
            assert equal(given, saved), "what was given is only read"
            steps(optimizer, params, 3)
            steps(other, others, 3)
            assert all(map(torch.equal, params, others))
            assert equal(unnamed(optimizer.state_dict()), unnamed(other.state_dict()))
            assert equal(saved, given), "and not kept either"
            other.param_groups.extend(other.param_groups)
            last = [unnamed(o.state_dict())["param_groups"][-1] for o in (optimizer, other)]
            assert last[0] == last[1]


@behaviour
def test_names_come_from_the_dict_if_it_has_them(kind):
    for first, second in itertools.product((False, True), repeat=2):
        params = layer()
        optimizer = ours(kind)(named(params, first))
        steps(optimizer, params, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        if first:
            saved["param_groups"][0]["param_names"] = ["of", "the dict"]
        other = ours(kind)(named(params, second))
        other.load_state_dict(saved)
        steps(other, params, 1)
        expected = ["of", "the dict"] if first else ["name0", "name1"] if second else None
        assert other.state_dict()["param_groups"][0].get("param_names") == expected


@behaviour
def test_older_state_dicts(kind):
    for options in inputs(kind, torch.float32, *FLAGS):
        params, optimizer = trained(kind, **options)
        older = copy.deepcopy(optimizer.state_dict())
        for name in (*INFOS[kind].not_og_supported_flags, *LATER_KEYS):
            older["param_groups"][0].pop(name, None)
        for entry in older["state"].values():
            entry["step"] = int(entry["step"])
            if "mu_product" in entry:
                entry["mu_product"] = entry["mu_product"].item()
        optimizer.load_state_dict(older)
        group = optimizer.param_groups[0]
        theirs = getattr(torch.optim, kind)([nn.Parameter(torch.ones(1))])
        for name, value in LATER_KEYS.items():
            if name in theirs.defaults:
                decoupled = kind == "AdamW" and name == "decoupled_weight_decay"
                assert group[name] == (True if decoupled else value), name
        steps(optimizer, params, 1)
        for entry in optimizer.state.values():
            assert entry["step"] == 4 and entry["step"].dtype == torch.float32


def test_decoupled_weight_decay_between_adam_and_adamw():
    params = layer()
    of_adamw = ours("AdamW")(params).state_dict()
    of_adam = ours("Adam")(params).state_dict()
    adam, adamw = ours("Adam")(layer()), ours("AdamW")(layer())
    assert not of_adam["param_groups"][0]["decoupled_weight_decay"]
    adam.load_state_dict(of_adamw)
    assert adam.param_groups[0]["decoupled_weight_decay"]
    assert adam._hyperparameters(adam.param_groups[0]).decoupled
    adamw.load_state_dict(of_adam)
    assert adamw.param_groups[0]["decoupled_weight_decay"]
    del of_adamw["param_groups"][0]["decoupled_weight_decay"]
    adamw.load_state_dict(of_adamw)
    assert adamw.param_groups[0]["decoupled_weight_decay"]


@behaviour
def test_what_is_saved_is_what_is_loaded(kind):
    for dtype, with_names in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        for options in inputs(kind, dtype, *FLAGS):
            params = layer(dtype)
            optimizer = ours(kind)(named(params, with_names), **options)
            steps(optimizer, params, 2)
            packed = optimizer.state_dict()
            assert equal(through_a_file(packed, weights_only=True), packed)
            assert equal(through_a_file(packed, weights_only=False), packed)
            assert equal(copy.deepcopy(packed), packed)
            assert equal(pickle.loads(pickle.dumps(packed)), packed)


@behaviour
def test_dicts_that_do_not_fit(kind):
    params, optimizer = trained(kind)
    before = copy.deepcopy(optimizer.state_dict())
    weight, bias = clones(params)
    for others, message in (
        ([{"params": [weight]}, {"params": [bias]}], "different number of parameter groups"),
        ([weight], "doesn't match the size of optimizer's group"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(ours(kind)(others).state_dict())
        assert equal(optimizer.state_dict(), before)


@behaviour
def test_state_of_others_is_kept_and_cast_as_in_torch(kind):
    params, optimizer = trained(kind)
    optimizer.state["epoch"] = {"step": 7}
    optimizer.state[params[0]]["mine"] = torch.ones(3, dtype=torch.float64)
    optimizer.param_groups[0]["label"] = "all"
    packed = optimizer.state_dict()
    assert packed["state"]["epoch"] == {"step": 7}
    copied_params, copied = copy.deepcopy((params, optimizer))
    fresh_params = clones(params)
    fresh = ours(kind)(fresh_params)
    fresh.state["old"] = 1
    fresh.load_state_dict(through_a_file(packed))
    assert "old" not in fresh.state
    pickled_params, pickled = pickle.loads(pickle.dumps((params, optimizer)))
    for other, of, dtype in (
        (copied, copied_params, torch.float64),
        (pickled, pickled_params, torch.float64),
        (fresh, fresh_params, torch.float32),  # as torch casts to the param's
    ):
        assert other.state["epoch"] == {"step": 7}
        assert other.param_groups[0]["label"] == "all"
        steps(other, of, 1)
        if kind != "NAdam":
            other.param_groups[0]["amsgrad"] = True
            steps(other, of, 1)  # one more tensor of ours beside what is there
        assert torch.equal(other.state[of[0]]["mine"], torch.ones(3, dtype=dtype))
        assert set(other.state) == {*of, "epoch"}


@behaviour
def test_amsgrad_comes_and_goes(kind):
    if kind == "NAdam":
        return
    params, optimizer = trained(kind, amsgrad=True)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["amsgrad"] = False
    others = clones(params)
    other = ours(kind)(others)
    other.load_state_dict(saved)
    for param, mine in zip(params, others, strict=True):
        assert equal(other.state[mine], dict(optimizer.state[param]))
    for group in (optimizer, other):
        group.param_groups[0]["amsgrad"] = False
    steps(optimizer, params, 2)
    steps(other, others, 2)
    assert equal(optimizer.state_dict(), other.state_dict())


@behaviour
def test_copies_have_the_same_public_attributes_and_go_on_alike(kind):
    for options in inputs(kind, torch.float32, *FLAGS):
        params, optimizer = trained(kind, **options)
        copied = [
            copy.deepcopy((params, optimizer)),
            pickle.loads(pickle.dumps((params, optimizer))),
            through_a_file((params, optimizer), weights_only=False),
        ]
        attributes = [{k for k in vars(o) if k[0] != "_"} for _, o in [(0, optimizer), *copied]]
        assert all(names == attributes[0] for names in attributes)
        steps(optimizer, params, 2)
        for others, other in copied:
            assert type(other) is type(optimizer) and other.defaults == optimizer.defaults
            steps(other, others, 2)
            assert all(map(torch.equal, params, others))
            assert equal(other.state_dict(), optimizer.state_dict())
            assert [g["params"] for g in other.param_groups] == [list(others)]


def grown(kind: str) -> tuple:
    """An optimizer whose params came one by one, and one of which is frozen by now."""
    params = (*layer(), *layer())
    params[2].requires_grad_(False)
    optimizer = ours(kind)([params[1]])
    optimizer.add_param_group({"params": [params[0], params[2]], "lr": 1e-4})
    optimizer.add_param_group({"params": [params[3]]})
    steps(optimizer, params[:2], 2)
    params[2].requires_grad_(True)
    steps(optimizer, params[:2], 1)
    params[0].requires_grad_(False)
    optimizer.zero_grad()
    steps(optimizer, params[2:], 1)
    return params, optimizer


@behaviour
def test_copies_of_optimizers_that_have_grown(kind):
    params, optimizer = grown(kind)
    assert optimizer.state[params[0]]["step"] == 3
    for others, other in (
        copy.deepcopy((params, optimizer)),
        pickle.loads(pickle.dumps((params, optimizer))),
    ):
        assert equal(other.state_dict(), optimizer.state_dict())
        steps(other, others[2:], 2)
        other.load_state_dict(optimizer.state_dict())
    steps(optimizer, params[2:], 2)
    assert all(map(torch.equal, params, others))


@behaviour
def test_setstate_takes_what_getstate_gives(kind):
    params, optimizer = trained(kind)
    packed = copy.deepcopy(optimizer.state_dict())
    optimizer.__setstate__(optimizer.__getstate__())
    assert equal(optimizer.state_dict(), packed)
    for entry in packed["state"].values():
        entry["step"] = 9.0
    state = dict(zip(params, packed["state"].values(), strict=True))
    groups = [{**packed["param_groups"][0], "params": list(params)}]
    del groups[0]["maximize"]
    given = {"state": state, "param_groups": groups}
    if "shard" in optimizer.__getstate__():
        given["shard"] = optimizer.__getstate__()["shard"]
    optimizer.__setstate__(given)
    assert all(entry["step"] == 9 for entry in optimizer.state.values())
    assert optimizer.param_groups[0]["maximize"] is False
    steps(optimizer, params, 1)
    assert all(entry["step"] == 10 for entry in optimizer.state.values())


def hook_everything(optimizer, calls: list[str]) -> list:
    """Hooks that wrap a state dict in another and take it out again; each call is noted."""

    def before(optimizer):
        calls.append("before")
        optimizer.state["test"] = 1

    def wrap(optimizer, packed):
        calls.append("wrap")
        return {"wrapped": packed, "test": packed["state"].pop("test")}

    def unwrap(optimizer, given):
        calls.append("unwrap")
        return given["wrapped"]

    return [
        optimizer.register_state_dict_pre_hook(before),
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("first"), prepend=True),
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("last")),
        optimizer.register_state_dict_post_hook(wrap, prepend=True),
        optimizer.register_load_state_dict_pre_hook(unwrap),
        optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded")),
    ]


@behaviour
def test_hooks_of_state_dict(kind):
    for options in inputs(kind, torch.float32, *FLAGS):
        params, optimizer = trained(kind, 1, **options)
        calls = []
        handles = hook_everything(optimizer, calls)
        packed = optimizer.state_dict()
        assert packed.keys() == {"wrapped", "test"} and packed["test"] == 1
        optimizer.load_state_dict(packed)
        assert calls == ["first", "before", "wrap", "last", "unwrap", "loaded"]
        assert "test" not in optimizer.state
        steps(optimizer, params, 1)
        for handle in handles:
            handle.remove()
        optimizer.load_state_dict(optimizer.state_dict())
        assert len(calls) == 6


@behaviour
def test_hooks_of_load_state_dict(kind):
    for options in inputs(kind, torch.float32, *FLAGS):
        params, optimizer = trained(kind, 1, **options)
        packed = optimizer.state_dict()

        def in_place(optimizer, given):
            given["param_groups"][0]["lr"] = 0.002

        def another(optimizer, given):
            given = copy.deepcopy(given)
            given["param_groups"][0]["lr"] = 0.003
            return given

        def after(optimizer):
            optimizer.state["lr seen"] = optimizer.param_groups[0]["lr"]

        optimizer.register_load_state_dict_pre_hook(in_place)
        optimizer.register_load_state_dict_post_hook(after)
        optimizer.load_state_dict(packed)
        assert optimizer.param_groups[0]["lr"] == optimizer.state["lr seen"] == 0.002
        handle = optimizer.register_load_state_dict_pre_hook(another, prepend=True)
        optimizer.load_state_dict(packed)
        assert optimizer.state["lr seen"] == 0.002
        handle.remove()
        optimizer.register_load_state_dict_pre_hook(another)
        optimizer.load_state_dict(packed)
        assert optimizer.state["lr seen"] == 0.003
        steps(optimizer, params, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_dicts_go_to_torch_and_back(kind):
    for options in inputs(kind, torch.float32, *FLAGS):
        params, optimizer = trained(kind, **options)
        copies = clones(params)
        theirs = getattr(torch.optim, kind)(copies, **options)
        theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(theirs, copies, 3)
        steps(optimizer, params, 3)
        torch.testing.assert_close(list(params), list(copies))
        for name, value in optimizer.state_dict()["state"][0].items():
            torch.testing.assert_close(
                value, theirs.state_dict()["state"][0][name], check_dtype=name != "mu_product"
            )
        optimizer.load_state_dict(theirs.state_dict())
        assert equal(loss_of(copies), loss_of(copies))
        steps(optimizer, params, 1)


@behaviour
def test_state_is_changed_in_place(kind):
    """What ``optimizer.state`` shows is what the step uses."""
    params, optimizer = trained(kind)
    for entry in optimizer.state.values():
        entry["step"].fill_(0)
        entry["exp_avg"].zero_()
        entry["exp_avg_sq"].zero_()
        if "mu_product" in entry:
            entry["mu_product"].fill_(1)
    others = clones(params)
    other = ours(kind)(others)
    steps(optimizer, params, 2)
    steps(other, others, 2)
    assert all(map(torch.equal, params, others))
