"""What torch's optimizers make of ``optimizer.state`` written to by hand, ours make of it too."""

import copy
import pickle
from collections import defaultdict

import pytest
import torch

from conformance import behaviour, clones, equal, layer, loss_of, ours, steps

MOMENTS = ("exp_avg", "exp_avg_sq")


def clear(optimizer, params):
    optimizer.state.clear()


def replace_all(optimizer, params):
    optimizer.state = defaultdict(dict)


def delete_one(optimizer, params):
    del optimizer.state[params[1]]


def pop_one(optimizer, params):
    assert optimizer.state.pop(params[0])["step"] == 3


def empty_one(optimizer, params):
    optimizer.state[params[0]].clear()


def assign_one(optimizer, params):
    entry = optimizer.state[params[0]]
    moments = {name: torch.full_like(entry[name], 0.25) for name in MOMENTS}
    others = {name: value.clone() for name, value in entry.items() if name not in MOMENTS}
    optimizer.state[params[0]] = {**others, **moments, "step": torch.tensor(7.0)}


def assign_a_tensor(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = torch.full_like(
        optimizer.state[params[0]]["exp_avg"], 2
    )


def update_entries(optimizer, params):
    for param in params:
        optimizer.state[param].update(step=torch.tensor(5.0))
        optimizer.state[param] |= {"step": torch.tensor(2.0)}


def move_all(optimizer, params):
    """As Lightning does, to the device where they are."""
    for param, entry in optimizer.state.items():
        optimizer.state[param] = {name: value.to("cpu") for name, value in entry.items()}


def swap_in_the_entry(optimizer, params):
    """Each a view of what the other is to be written to."""
    entry = optimizer.state[params[0]]
    entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg_sq"], entry["exp_avg"].abs()


EDITS = [
    *(clear, replace_all, delete_one, pop_one, empty_one, assign_one, assign_a_tensor),
    *(update_entries, move_all, swap_in_the_entry),
]


@behaviour
def test_state_written_to_by_hand_has_the_effect_it_has_in_torch(kind):
    torch.set_default_dtype(torch.float64)  # else torch keeps NAdam's product in float32
    try:
        for edit in EDITS:
            has_torchs_effect(kind, edit)
    finally:
        torch.set_default_dtype(torch.float32)


def has_torchs_effect(kind, edit):
    params = layer(torch.float64)
    copies = clones(params)
    optimizer = ours(kind)(params)
    theirs = getattr(torch.optim, kind)(copies, foreach=False)
    for one, of in ((optimizer, params), (theirs, copies)):
        steps(one, of, 3)
        edit(one, of)
        steps(one, of, 2)
    for mine, other in zip(params, copies, strict=True):
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12), edit.__name__
        assert set(optimizer.state[mine]) == set(theirs.state[other])
        assert optimizer.state[mine]["step"] == theirs.state[other]["step"], edit


@behaviour
def test_it_is_also_what_is_saved(kind):
    params = layer()
    optimizer = ours(kind)(params)
    steps(optimizer, params, 3)
    entry = optimizer.state[params[1]]
    entry["exp_avg"] = entry["exp_avg"] + 1
    expected = copy.deepcopy(dict(entry))
    packed = optimizer.state_dict()
    assert type(packed["state"][1]) is dict
    others = clones(params)
    other = ours(kind)(others)
    other.load_state_dict(packed)
    assert equal(dict(other.state[others[1]]), expected)
    optimizer.state.clear()
    for saved in (optimizer.state_dict(), pickle.loads(pickle.dumps(optimizer)).state_dict()):
        assert all(entry["step"] == 0 for entry in saved["state"].values())
    copied = copy.deepcopy(optimizer.state)
    assert type(copied) is defaultdict and all(type(entry) is dict for entry in copied.values())


@behaviour
def test_loading_replaces_what_was_written(kind):
    params = layer()
    optimizer = ours(kind)(params)
    steps(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.state[params[0]] = "no dict"
    optimizer.state[params[1]]["exp_avg"] = torch.ones(7)
    optimizer.load_state_dict(saved)
    assert equal(optimizer.state_dict(), saved)
    steps(optimizer, params, 1)


@behaviour
def test_what_does_not_fit_is_refused(kind):
    params = layer()
    optimizer = ours(kind)([("weight", params[0]), ("bias", params[1])])
    steps(optimizer, params, 2)
    held = copy.deepcopy(optimizer.state_dict())
    before = clones(params)
    entry = dict(optimizer.state[params[0]])
    lacking = {name: value for name, value in entry.items() if name != "exp_avg_sq"}
    for given, message in (
        ({**entry, "exp_avg": torch.ones(4)}, r"weight: expected exp_avg of shape \(40, 30\)"),
        ({**entry, "exp_avg": 0.5}, "weight: expected a tensor for 'exp_avg', found float"),
        ({**entry, "step": None}, "weight: expected a number for 'step', found nothing"),
        ({**entry, "step": torch.ones(2)}, "weight: expected a number for 'step', found Tensor"),
        (lacking, "weight: optimizer.state has no 'exp_avg_sq' for it"),
        ({"mine": 1}, "weight: expected a number for 'step', found nothing"),
        ([], r"weight: expected a dict in optimizer.state, found list"),
    ):
        optimizer.state[params[0]] = given
        loss_of(params)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        with pytest.raises(ValueError, match=message):
            optimizer.state_dict()
        assert all(map(torch.equal, params, before))
        optimizer.state[params[0]] = entry
        assert equal(optimizer.state_dict(), held)
    optimizer.state = None
    with pytest.raises(ValueError, match="optimizer.state: expected a dict, found NoneType"):
        optimizer.step()
