"""State that is written to by hand: what is ours alone, see [Note: state by hand]."""

import copy

import pytest
import torch

import shardadam
from conformance import equal, layer, steps
from models import loss_of, mlp, same, train, values
from ranks import run_ranks
from shardadam import checkpoint


def edit_on_one(rank):
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters())
    train(model, optimizer, range(2))
    before = values(model)
    if rank == 1:
        optimizer.state[model[2].bias]["step"] = torch.tensor(0.0)
        optimizer.state_dict()  # taken by now
    for _ in range(2):
        loss_of(model, 5).backward()
        with pytest.raises(ValueError, match=r"rank 0 has nothing, rank 1 has the state of 2.bias"):
            optimizer.step()
        assert same(values(model), before)
    if rank == 0:
        optimizer.state[model[2].bias]["step"] = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.state[model[2].bias]["step"] == 1
    train(model, optimizer, range(3))


def test_ranks_that_write_other_things_are_told_so():
    run_ranks(2, edit_on_one)


def test_masters_start_anew_from_the_params():
    for options in ({}, {"master": "fp32"}):
        model = mlp(torch.bfloat16)
        optimizer = shardadam.AdamW(model.parameters(), **options)
        train(model, optimizer, range(3))
        fresh = mlp(torch.bfloat16)
        fresh.load_state_dict(model.state_dict())
        other = shardadam.AdamW(fresh.parameters(), **options)
        optimizer.state.clear()
        train(model, optimizer, range(3, 6))
        train(fresh, other, range(3, 6))
        assert same(values(model), values(fresh))
        assert equal(optimizer.state_dict(), other.state_dict())


def full_tensors(rank):
    params = layer()
    optimizer = shardadam.NAdam(params)
    steps(optimizer, params, 1)
    full = torch.arange(1200.0).view(40, 30)
    optimizer.state[params[0]]["exp_avg"] = full
    held = optimizer.consolidate_state_dict()
    assert (held is None) == (rank == 1)
    if rank == 0:
        assert torch.equal(held["state"][0]["exp_avg"], full)
    assert optimizer.state[params[0]]["exp_avg"].shape == ((640, 560)[rank],)


def test_full_tensors_are_taken_apart_by_the_ranks():
    run_ranks(2, full_tensors)


def saved(rank, root):
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters())
    train(model, optimizer, range(2))
    optimizer.state[model[0].weight]["step"] = torch.tensor(30.0)
    optimizer.state[model[0].bias].clear()
    checkpoint.save(root, step=1, optimizer=optimizer)
    held = copy.deepcopy(optimizer.consolidate_state_dict())
    optimizer.state.clear()
    checkpoint.load(root, optimizer=optimizer)
    assert optimizer.state[model[0].weight]["step"] == 30
    assert not optimizer.state[model[0].bias]["exp_avg"].any()
    assert equal(optimizer.consolidate_state_dict(), held)
    train(model, optimizer, range(2, 3))


def test_checkpoints_hold_what_was_written_and_loading_replaces_it(tmp_path):
    run_ranks(2, saved, str(tmp_path))


def test_what_others_keep_there_leaves_the_views_alone():
    """So that a step after it costs what a step does."""
    params = layer()
    optimizer = shardadam.AdamW(params)
    steps(optimizer, params, 1)
    view = optimizer.state[params[0]]["exp_avg"]
    optimizer.state[params[0]]["mine"] = 1
    optimizer.state[params[1]] = {**optimizer.state[params[1]], "mine": 2}
    steps(optimizer, params, 1)
    assert optimizer.state[params[0]]["exp_avg"] is view
    assert [optimizer.state[param]["mine"] for param in params[:2]] == [1, 2]
    optimizer.state[params[1]]["step"] = 30.0  # noticed in the dict that was put there too
    steps(optimizer, params, 1)
    assert optimizer.state[params[1]]["step"] == 31
