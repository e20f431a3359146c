"""state_dict(): local, exact at the same world size; full tensors load, others are refused."""

import copy
import io
import re

import pytest
import torch
import torch.distributed as dist

import shardadam
from models import loss_of, mlp, same, train, values
from ranks import run_ranks

KINDS = [
    ("AdamW", torch.float32, {}),
    ("Adam", torch.float32, {"amsgrad": True, "weight_decay": 0.1}),
    ("NAdam", torch.float32, {}),
    ("AdamW", torch.bfloat16, {"shard_grads": True}),
    ("AdamW", torch.bfloat16, {"master": "fp32"}),
    ("AdamW", torch.float16, {}),
    ("NAdam", torch.float64, {"bucket_bytes": 4096}),
    ("NAdam", torch.float32, {"state": "bf16"}),
    ("AdamW", torch.bfloat16, {"memory": "lean", "bucket_bytes": 4096}),
    ("Adam", torch.bfloat16, {"memory": "leanest", "amsgrad": True}),
]


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def goes_on(rank: int) -> None:
    for kind, dtype, options in KINDS:
        model = mlp(dtype)
        optimizer = getattr(shardadam, kind)(model.parameters(), **options)
        train(model, optimizer, range(rank, rank + 4))
        saved = through_a_file((model.state_dict(), optimizer.state_dict()))
        other = mlp(dtype, seed=1)
        resumed = getattr(shardadam, kind)(other.parameters(), lr=0.5, **options)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        for trained, by in ((model, optimizer), (other, resumed)):
            train(trained, by, range(10 + rank, 14 + rank))
        assert same(values(model), values(other)), (kind, dtype, options)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_goes_on_bit_for_bit(world_size):
    run_ranks(world_size, goes_on)


def local(rank: int) -> None:
    optimizer = shardadam.AdamW(mlp().parameters())
    if rank == 0:  # one rank alone: anything collective would hang
        packed = optimizer.state_dict()
        assert list(packed["state"]) == list(range(6))
        assert all(entry["step"] == 0 for entry in packed["state"].values())
    dist.barrier()


def test_never_communicates():
    run_ranks(2, local)


def sliced(rank: int, full: dict, expected: list, kind: str, dtype: torch.dtype) -> list:
    model = mlp(dtype)
    optimizer = getattr(shardadam, kind)(model.parameters())
    optimizer.load_state_dict(full)
    if kind == "NAdam":
        for param, saved in zip(model.parameters(), full["state"].values(), strict=True):
            assert optimizer.state[param]["mu_product"] == saved["mu_product"]
    flat = [optimizer.state[param]["exp_avg"].flatten() for param in model.parameters()]
    pieces = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, flat)
    for index, moment in enumerate(expected):
        joined = torch.cat([piece[index] for piece in pieces])
        assert torch.equal(joined, moment.flatten())
    train(model, optimizer, range(20, 22))
    return values(model)


@pytest.mark.filterwarnings("ignore:gradients are equal")
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    # A run in float32 goes on in bfloat16 with the moments it had.
    [("AdamW", torch.float32), ("NAdam", torch.float32), ("AdamW", torch.bfloat16)],
)
def test_torchs_state_is_sliced(kind, dtype, world_size):
    model = mlp()
    optimizer = getattr(torch.optim, kind)(model.parameters())
    train(model, optimizer, range(5))
    full = copy.deepcopy(optimizer.state_dict())
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    results = run_ranks(world_size, sliced, full, moments, kind, dtype)
    assert all(same(params, results[0]) for params in results)


def test_loads_into_torch():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(3))
    other = mlp()
    theirs = torch.optim.AdamW(other.parameters())
    theirs.load_state_dict(through_a_file(optimizer.state_dict()))
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        shardadam.AdamW(list(mlp().parameters())[:-1]).load_state_dict(optimizer.state_dict())
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[left][name], theirs.state[right][name])
            assert optimizer.state[left][name].shape == theirs.state[right][name].shape


def test_float32_moments_stay_float32_beside_bfloat16_params():
    model = mlp(torch.bfloat16)
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(3))
    moments = [optimizer.state[param]["exp_avg"].clone() for param in model.parameters()]
    other = mlp(torch.bfloat16)
    resumed = shardadam.AdamW(other.parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for param, moment in zip(other.parameters(), moments, strict=True):
        assert resumed.state[param]["exp_avg"].dtype == torch.float32
        assert torch.equal(resumed.state[param]["exp_avg"], moment)


def test_older_and_other_dicts():
    model = mlp()
    optimizer = shardadam.Adam(model.parameters())
    train(model, optimizer, range(3))
    older = copy.deepcopy(optimizer.state_dict())
    for entry in older["state"].values():
        entry["step"] = entry["step"].item()
    del older["param_groups"][0]["maximize"]
    older["param_groups"][0]["amsgrad"] = True  # saved without AMSGrad, goes on with it
    other = mlp()
    resumed = shardadam.Adam(other.parameters())
    resumed.load_state_dict(older)
    state = resumed.state[other[0].weight]
    assert state["step"] == 3
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])
    train(other, resumed, range(1))
    # A param that was never stepped has no state.
    fresh = {"state": {}, "param_groups": resumed.state_dict()["param_groups"]}
    resumed.load_state_dict(fresh)
    assert not resumed.state[other[0].weight]["exp_avg"].any()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state[2].pop("exp_avg"), "2.weight: the state dict has no 'exp_avg'"),
        (
            lambda state: state[2].update(exp_avg=torch.zeros(3, 3)),
            "2.weight: expected exp_avg of shape (65, 90), found (3, 3)",
        ),
    ],
)
def test_a_dict_that_does_not_fit_changes_nothing(spoil, message):
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters())
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["state"])
    saved["param_groups"][0]["lr"] = 9.0
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        assert all(torch.equal(value, after["state"][index][name]) for name, value in entry.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda entry: entry.pop("max_exp_avg_sq_q16_scale"),
            "the state dict has no 'max_exp_avg_sq_q16_scale' for it",
        ),
        (
            lambda entry: entry.update(exp_avg_ratio="x"),
            "expected a tensor for 'exp_avg_ratio', found str",
        ),
        (
            lambda entry: entry.update(max_exp_avg_sq_q16=torch.zeros(65, 90)),
            "expected max_exp_avg_sq_q16 in torch.int16, found torch.float32",
        ),
    ],
)
def test_codes_that_do_not_fit_are_refused(spoil, message):
    optimizer = shardadam.AdamW(mlp().named_parameters(), memory="lean", amsgrad=True)
    saved = optimizer.state_dict()
    spoil(saved["state"][2])
    with pytest.raises(ValueError, match=re.escape(f"2.weight: {message}")):
        optimizer.load_state_dict(saved)


def shards_elsewhere(rank: int, folder: str) -> None:
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters())
    loss_of(model, rank).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), f"{folder}/{dist.get_world_size()}-{rank}.pt")
    dist.barrier()
    other = torch.load(f"{folder}/{dist.get_world_size()}-{1 - rank}.pt")
    with pytest.raises(ValueError, match=rf"was saved by rank {1 - rank} of 2 .* rank {rank} of 2"):
        optimizer.load_state_dict(other)
    # Other buckets cut the shards elsewhere.
    own = torch.load(f"{folder}/{dist.get_world_size()}-{rank}.pt")
    other_cut = shardadam.AdamW(mlp().named_parameters(), bucket_bytes=1024)
    with pytest.raises(ValueError, match=r"\d.weight: exp_avg .* Expected the same layout"):
        other_cut.load_state_dict(own)
    assert all(not entry["step"] for entry in other_cut.state_dict()["state"].values())


def test_another_ranks_shard_is_refused(tmp_path):
    run_ranks(2, shards_elsewhere, str(tmp_path))
    optimizer = shardadam.AdamW(mlp().named_parameters())
    with pytest.raises(ValueError, match="was saved by rank 1 of 2 .* this is rank 0 of 1"):
        optimizer.load_state_dict(torch.load(tmp_path / "2-1.pt"))


def test_state_of_a_param_that_is_frozen_here_is_left_out():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(2))
    other = mlp()
    other[0].bias.requires_grad_(False)
    resumed = shardadam.AdamW(other.parameters())
    with pytest.warns(UserWarning, match="param 1 is frozen here: its state"):
        resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[other[0].weight]["step"] == 2


def test_moments_of_16_bit_params_keep_their_bits_where_strides_differ():
    weight = torch.randn(70, 5, 3, 3).bfloat16()
    last = torch.nn.Parameter(weight.to(memory_format=torch.channels_last))
    plain = torch.nn.Parameter(weight.clone())
    saved, resumed = shardadam.AdamW([last]), shardadam.AdamW([plain])
    last.grad = torch.randn_like(last)
    saved.step()
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    for name in ("exp_avg", "exp_avg_sq", "remainder"):
        assert torch.equal(resumed.state[plain][name], saved.state[last][name])
