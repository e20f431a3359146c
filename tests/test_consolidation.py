"""consolidate_state_dict(): the whole state on one rank, for torch.optim and back, bit for bit."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peaks import peak_growth

import shardadam
from models import Awkward, mlp, same, train, values
from ranks import run_ranks
from shardadam.shard_tensor import ShardTensor

KINDS = [
    ("AdamW", torch.float32, {}),
    ("Adam", torch.float32, {"amsgrad": True, "weight_decay": 0.1}),
    ("NAdam", torch.float32, {"bucket_bytes": 4096}),
    ("AdamW", torch.bfloat16, {"shard_grads": True}),
    ("AdamW", torch.bfloat16, {"master": "fp32"}),
    ("AdamW", torch.float16, {}),
]


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def everywhere(value, source: int):
    """The receiver's object on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def trained(rank: int, kind: str, dtype: torch.dtype, options: dict):
    model = mlp(dtype)
    optimizer = getattr(shardadam, kind)(model.named_parameters(), **options)
    train(model, optimizer, range(rank, rank + 3))
    return model, optimizer


def goes_on(rank: int) -> None:
    world_size = dist.get_world_size()
    for number, (kind, dtype, options) in enumerate(KINDS):
        to = number % world_size
        model, optimizer = trained(rank, kind, dtype, options)
        whole = optimizer.consolidate_state_dict(to)
        assert (whole is not None) == (rank == to)
        whole = everywhere(whole and through_a_file(whole), to)
        # Ours, with other buckets, goes on with the same bits.
        other = mlp(dtype, seed=1)
        resumed = getattr(shardadam, kind)(
            other.named_parameters(), lr=0.5, **{**options, "bucket_bytes": 999}
        )
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(whole)
        # torch's holds the same numbers.
        theirs = getattr(torch.optim, kind)(mlp().parameters())
        theirs.load_state_dict(whole)
        assert theirs.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        for entry, state in zip(whole["state"].values(), theirs.state.values(), strict=True):
            for name, value in entry.items():
                assert torch.equal(state[name], value.to(state[name].dtype))
                assert value.dim() == 0 or name in optimizer.state[model[0].weight]
        for trained_model, by in ((model, optimizer), (other, resumed)):
            train(trained_model, by, range(10 + rank, 13 + rank))
        assert same(values(model), values(other)), (kind, dtype, options)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_goes_on_bit_for_bit(world_size):
    run_ranks(world_size, goes_on)


def like_torch(rank: int) -> None:
    """torch.optim, given what is consolidated, holds and does what it did for itself."""
    for options in ({}, {"bucket_bytes": 512}):
        model, reference = Awkward(), Awkward()
        optimizer = shardadam.AdamW(model.parameters(), **options)
        theirs = torch.optim.AdamW(reference.parameters())
        for seed in range(3):
            for one, by in ((model, optimizer), (reference, theirs)):
                one.train_a_step(seed)
                by.step()
        to = dist.get_world_size() - 1
        whole = optimizer.consolidate_state_dict(to=to)
        if rank != to:
            continue
        expected = theirs.state_dict()["state"]
        assert list(whole["state"]) == list(expected)
        params = dict(enumerate(model.parameters()))
        for index, entry in expected.items():
            found = whole["state"][index]
            assert list(found) == list(entry)
            for name, value in entry.items():
                assert found[name].shape == value.shape
                assert found[name].dtype == value.dtype
                torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-7)
                if value.dim() > 0:
                    assert found[name].stride() == params[index].stride()
        again = Awkward()
        again.load_state_dict(copy.deepcopy(model.state_dict()))
        takes_over = torch.optim.AdamW(again.parameters())
        takes_over.load_state_dict(whole)
        again.train_a_step(9)
        takes_over.step()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_awkward_params(world_size):
    run_ranks(world_size, like_torch)


def is_a_snapshot(rank: int) -> None:
    model, optimizer = trained(rank, "AdamW", torch.float32, {})
    whole = optimizer.consolidate_state_dict()
    before = copy.deepcopy(whole)
    train(model, optimizer, range(2))
    if rank == 0:
        for index, entry in before["state"].items():
            assert all(torch.equal(whole["state"][index][name], entry[name]) for name in entry)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_snapshot_stays_as_it_is(world_size):
    run_ranks(world_size, is_a_snapshot)


def is_sharded(state_dict: dict) -> bool:
    tensors = [v for entry in state_dict["state"].values() for v in entry.values() if v.dim()]
    assert len({type(tensor) for tensor in tensors}) == 1
    return isinstance(tensors[0], ShardTensor)


def is_saved(rank: int, options: dict) -> None:
    """As with ZeroRedundancyOptimizer; Lightning and Hugging Face's Trainer save like this."""
    model, optimizer = trained(rank, "AdamW", torch.bfloat16, {"bucket_bytes": 4096, **options})
    moment = next(name for name in optimizer.state[model[0].weight] if name.startswith("exp_avg"))
    changes = [
        lambda: train(model, optimizer, range(1)),
        lambda: optimizer.state[model[0].weight][moment].add_(1),
        lambda: optimizer.state[model[0].weight]["step"].add_(1),
        lambda: optimizer.state.clear(),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: optimizer.add_param_group(
            {"params": [("late", torch.nn.Parameter(torch.ones(9)))]}
        ),
    ]
    for change in changes:
        to = 1
        whole = optimizer.consolidate_state_dict(to)
        optimizer.param_groups[0]["lr"] *= 0.5
        held = optimizer.state_dict()
        copied = copy.deepcopy(held)
        written = copy.deepcopy(held)
        for entry in written["state"].values():
            entry[moment].copy_(entry[moment])
        for found in (held, copied):
            assert is_sharded(found)
            saved = through_a_file(found)
            assert is_sharded(saved) == (rank != to)
            assert saved["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"]
            if rank == to:
                for index, entry in saved["state"].items():
                    for name, value in entry.items():
                        assert torch.equal(whole["state"][index][name], value)
        assert isinstance(through_a_file(written)["state"][0][moment], ShardTensor)
        change()
        assert is_sharded(through_a_file(optimizer.state_dict()))
        assert is_sharded(through_a_file(held))  # what it refers to has changed
        assert is_sharded(through_a_file(copied)) == (rank != to)


@pytest.mark.parametrize("options", [{}, {"memory": "leanest"}], ids=["plain", "coded"])
def test_what_the_receiver_saves_is_whole(options):
    run_ranks(2, is_saved, options)


def refuses(rank: int) -> None:
    _, optimizer = trained(rank, "AdamW", torch.float32, {})
    for to in (2, -1, None, 0.0):
        with pytest.raises(ValueError, match="Invalid to: .* expected a rank from 0 to 1"):
            optimizer.consolidate_state_dict(to)
    with pytest.raises(ValueError, match="rank 0 has to=0, rank 1 has to=1"):
        optimizer.consolidate_state_dict(to=rank)
    expected = (
        (RuntimeError, r"consolidate_state_dict\(\): rank 1: ValueError: Invalid to: 7")
        if rank == 0
        else (ValueError, "Invalid to: 7")
    )
    with pytest.raises(expected[0], match=expected[1]):
        optimizer.consolidate_state_dict(to=7 * rank)
    with pytest.raises(RuntimeError, match=r"rank 0 is in consolidate_state_dict\(\), rank 1 is"):
        if rank == 0:
            optimizer.consolidate_state_dict()
        else:
            optimizer.step()
    assert (optimizer.consolidate_state_dict(1) is None) == (rank == 0)  # and no rank is stuck
    optimizer._broken = "a test"
    with pytest.raises(RuntimeError, match="broken off by a test"):
        optimizer.consolidate_state_dict()


def test_what_can_not_be_is_an_error_on_every_rank():
    run_ranks(2, refuses)


def test_torchs_rounded_remainder_is_not_taken_for_one():
    # torch.optim keeps it, in the dtype of the param, and trains on without it.
    model = mlp(torch.bfloat16)
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(4))
    assert optimizer.state[model[0].weight]["remainder"].any()
    other = mlp(torch.bfloat16)
    theirs = torch.optim.AdamW(other.parameters())
    theirs.load_state_dict(optimizer.consolidate_state_dict())
    train(other, theirs, range(2))
    resumed = shardadam.AdamW(other.parameters())
    resumed.load_state_dict(theirs.state_dict())
    assert not resumed.state[other[0].weight]["remainder"].any()
    assert resumed.state[other[0].weight]["exp_avg"].any()
    wide = shardadam.AdamW(other.parameters(), master="fp32")
    stale = copy.deepcopy(theirs.state_dict())
    for entry in stale["state"].values():
        entry["master"] = entry["remainder"]
    wide.load_state_dict(stale)
    assert torch.equal(wide.state[other[0].weight]["master"], other[0].weight.float())


def grown(rank: int) -> float:
    params = [torch.nn.Parameter(torch.ones(1024, 1024)) for _ in range(16)]
    optimizer = shardadam.AdamW(params, bucket_bytes=8 * 2**20)
    for entry in optimizer.state.values():
        for value in entry.values():
            value.fill_(1.0)  # there, not only promised
    return peak_growth(lambda: kept.append(optimizer.consolidate_state_dict()))


kept: list = []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read as on Linux")
def test_only_the_receiver_holds_the_whole():
    receiver, *others = run_ranks(3, grown)
    bucket = 2 * 8  # MiB of moments
    assert 100 < receiver < 128 + bucket, receiver
    assert max(others) < bucket, others
