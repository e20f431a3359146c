"""Several ranks: the mean of their gradients, the same bits on all and at every world size."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

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


VARIANTS = [
    ("Adam", torch.float32, {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", torch.bfloat16, {"amsgrad": True, "master": "fp32"}),
    ("NAdam", torch.bfloat16, {}),
    ("NAdam", torch.float64, {"decoupled_weight_decay": True, "maximize": True}),
]


def train_variants(rank: int) -> list[list]:
    results = []
    for kind, dtype, options in VARIANTS:
        model = mlp(dtype)
        exact_gradients(model)
        optimizer = getattr(shardadam, kind)(model.parameters(), bucket_bytes=4096, **options)
        train(model, optimizer, range(10))
        results.append(values(model))
    return results


@pytest.mark.filterwarnings("ignore:gradients are equal on all ranks")
def test_every_variant_gives_the_same_bits_on_three_ranks():
    alone = train_variants(0)
    for results in run_ranks(3, train_variants):
        for variant, params, expected in zip(VARIANTS, results, alone, strict=True):
            assert same(params, expected), variant


def odd_params() -> list[nn.Parameter]:
    """Shapes, strides and dtypes that trip up flat buffers; some buckets have no element at all."""
    torch.manual_seed(0)
    return [
        nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(70, 50).t()),
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.randn(30, 3, dtype=torch.complex64)),
        nn.Parameter(torch.randn(300, dtype=torch.float64)),
        nn.Parameter(torch.empty(0, dtype=torch.bfloat16)),
    ]


def odd_loss(params: list, seed: int) -> Tensor:
    """Linear in the params: the gradients are random numbers that are a function of ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    products = [p * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    reals = [torch.view_as_real(p) if p.is_complex() else p for p in products]
    return sum(real.double().sum() for real in reals)


def train_odd_params(rank: int) -> None:
    world_size = dist.get_world_size()
    for shard_grads in (False, True):
        ours, theirs = odd_params(), odd_params()
        strides = [param.stride() for param in ours]
        optimizer = shardadam.NAdam(
            ours, shard_grads=shard_grads, max_grad_norm=1.0, bucket_bytes=2048
        )
        reference = torch.optim.NAdam(theirs)
        for step in range(5):
            optimizer.zero_grad()
            reference.zero_grad()
            seeds = range(10 * step, 10 * step + world_size)
            odd_loss(ours, seeds[rank]).backward()
            (sum(odd_loss(theirs, seed) for seed in seeds) / world_size).backward()
            norm = nn.utils.clip_grad_norm_(theirs, 1.0)
            optimizer.step()
            reference.step()
            # Torch adds up squares in float32.
            torch.testing.assert_close(optimizer.grad_norm, norm.float(), rtol=1e-5, atol=0)
        assert strides == [param.stride() for param in ours]
        for left, right in zip(ours, theirs, strict=True):
            # 5 steps, each off by a few ulp of max(|p|, lr) < 8.
            torch.testing.assert_close(left, right, rtol=0, atol=2e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_params_of_every_shape_stride_and_dtype(world_size):
    run_ranks(world_size, train_odd_params)


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


def copied(rank: int) -> None:
    model = mlp(torch.bfloat16)
    optimizer = shardadam.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(rank, rank + 3))
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for trained, by in [(model, optimizer), *copies]:
        train(trained, by, range(10 + rank, 13 + rank))
    assert all(same(values(model), values(other)) for other, _ in copies)


def test_deepcopy_and_pickle_carry_the_shards():
    run_ranks(2, copied)


def in_another_order(rank: int) -> str:
    """Two optimizers of equal layout and hyperparameters; rank 1 steps the second one first."""
    models = [mlp(seed=0), mlp(seed=1)]
    optimizers = [shardadam.AdamW(model.parameters()) for model in models]
    for model in models:
        loss_of(model, rank).backward()
    before = [value for model in models for value in values(model)]
    with pytest.raises(RuntimeError) as caught:
        for optimizer in optimizers if rank == 0 else reversed(optimizers):
            optimizer.step()
    assert same(before, [value for model in models for value in values(model)])
    return str(caught.value)


def test_two_optimizers_are_not_mistaken_for_each_other():
    for message in run_ranks(2, in_another_order, timeout_s=30):
        assert "different points" in message
