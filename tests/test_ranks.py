"""Several ranks: the mean of their gradients, the same bits on all and at every world size."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardadam
from models import loss_of, mlp, same, train, values
from ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIGS = [
    {"bucket_bytes": bucket_bytes, "max_grad_norm": norm, "shard_grads": shard}
    for bucket_bytes, norm, shard in itertools.product((1024, 1 << 25), (None, 0.01), (False, True))
]


def exact_gradients(model: nn.Module) -> None:
    """Gradients of 8 significant bits, whose sum over a few ranks is exact."""
    for param in model.parameters():
        param.register_hook(lambda grad: grad.bfloat16().to(grad.dtype))


def train_alike(rank: int, dtype: torch.dtype) -> list[tuple]:
    """50 steps with the same gradients on every rank, for every configuration."""
    results = []
    for config in CONFIGS:
        model = mlp(dtype)
        exact_gradients(model)
        optimizer = shardadam.AdamW(model.parameters(), lr=1e-2, **config)
        train(model, optimizer, range(50))
        results.append((values(model), optimizer.grad_norm))
    return results


@pytest.mark.filterwarnings("ignore:gradients are equal on all ranks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_world_size_gives_the_same_bits(dtype):
    alone = train_alike(0, dtype)
    for config, (params, norm) in zip(CONFIGS, alone, strict=True):
        clipped = config["max_grad_norm"] is not None
        first = next(
            i for i, c in enumerate(CONFIGS) if (c["max_grad_norm"] is not None) == clipped
        )
        assert same(params, alone[first][0]), config
        assert norm == alone[first][1]
    for world_size in (2, 3, 4):
        for rank, results in enumerate(run_ranks(world_size, train_alike, dtype)):
            for config, (params, norm), (expected, expected_norm) in zip(
                CONFIGS, results, alone, strict=True
            ):
                assert same(params, expected), (world_size, rank, config)
                assert norm == expected_norm


def train_apart(rank: int) -> list:
    """20 steps with gradients of the rank's own; after each step all ranks hold the same."""
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters(), lr=1e-3)
    for step in range(20):
        train(model, optimizer, range(step * 10 + rank, step * 10 + rank + 1))
        flat = torch.cat([param.detach().flatten() for param in model.parameters()])
        everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, flat)
        assert all(torch.equal(flat, other) for other in everyone)
    return values(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_different_gradients_are_averaged_and_reproducible(world_size):
    first, second = (run_ranks(world_size, train_apart) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(20):
        optimizer.zero_grad()
        for rank in range(world_size):
            (loss_of(model, step * 10 + rank) / world_size).backward()
        optimizer.step()
    for ours, theirs in zip(first[0], values(model), strict=True):
        # Gradients near zero lose their sign to rounding, and a step is lr whatever their size.
        assert (ours - theirs).abs().median() < 1e-7
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def start_values(rank: int) -> list:
    model = mlp(torch.bfloat16, seed=rank)
    shardadam.AdamW(model.parameters())
    # The same numbers in another order.
    permuted = nn.Parameter(torch.arange(1000.0).roll(rank))
    shardadam.AdamW([permuted])
    assert torch.equal(permuted, torch.arange(1000.0))
    return values(model)


def test_the_first_ranks_values_are_everyones():
    for params in run_ranks(3, start_values):
        assert same(params, values(mlp(torch.bfloat16, seed=0)))


def in_a_subgroup(rank: int) -> list | None:
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        with pytest.raises(ValueError, match="not one of its ranks"):
            shardadam.Adam(mlp().parameters(), process_group=group)
        return None
    model = mlp()
    optimizer = shardadam.Adam(model.parameters(), process_group=group)
    train(model, optimizer, range(rank, rank + 3))
    assert f"rank {[1, 3].index(rank)} of 2 (gloo)" in repr(optimizer)
    return values(model)


def test_a_process_group_of_its_own():
    results = run_ranks(4, in_a_subgroup)
    assert same(results[1], results[3])


def state_bytes(rank: int) -> list[int]:
    """Bytes of state storage per element of the shard, and the padding they include."""
    found = []
    for dtype, options in (
        (torch.float32, {}),
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master": "fp32"}),
        (torch.float16, {}),
    ):
        model = mlp(dtype)
        optimizer = shardadam.AdamW(model.parameters(), **options)
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for state in optimizer.state.values()
            for name, tensor in state.items()
            if name != "step"
        }
        found.append(sum(storages.values()))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_state_is_a_ranks_share(world_size):
    numel = sum(param.numel() for param in mlp().parameters())
    padding = 128 * (world_size + 6)  # up to a block per rank and per param
    per_element = [4 + 4, 4 + 4 + 4, 4 + 4 + 2, 4 + 4 + 4, 4 + 4 + 4]
    for found in run_ranks(world_size, state_bytes):
        for size, bytes_each in zip(found, per_element, strict=True):
            share = bytes_each * numel / world_size
            assert share <= size <= share + bytes_each * padding / world_size


def unequal_presence(rank: int) -> tuple:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    before = values(model)
    loss_of(model, rank).backward()
    params = list(model.parameters())
    params[0].grad = None  # nowhere
    if rank == 0:
        params[2].grad = None  # here only
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[2], before[2])
    return [optimizer.state[param]["step"].item() for param in params], values(model)


def test_params_without_gradients_on_some_or_all_ranks():
    first, second = run_ranks(2, unequal_presence)
    assert first[0] == second[0] == [0, 1, 1, 1, 1, 1]
    assert same(first[1], second[1])


def grow(rank: int) -> tuple:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = shardadam.AdamW(model[0].parameters())
    frozen = model[0].weight.clone()
    train(model, optimizer, range(rank, rank + 1))
    assert torch.equal(model[0].weight, frozen)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
    model[0].weight.requires_grad_(True)
    train(model, optimizer, range(rank, rank + 3))
    assert not torch.equal(model[0].weight, frozen)
    return values(model)


def test_added_groups_and_unfrozen_params():
    first, second = run_ranks(2, grow)
    assert same(first, second)
