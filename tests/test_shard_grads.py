"""shard_grads=True (ZeRO-2): gradients are reduced and freed during backward."""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardadam
from models import loss_of, mlp, same, train, values
from ranks import run_ranks
from training_peak import PARAM_BYTES, peak_of_training


def modes_agree(rank: int) -> None:
    results = []
    for shard_grads in (False, True):
        model = mlp()
        optimizer = shardadam.AdamW(
            model.parameters(), shard_grads=shard_grads, bucket_bytes=4096, max_grad_norm=0.1
        )
        train(model, optimizer, range(rank * 100, rank * 100 + 5))
        optimizer.zero_grad()
        loss_of(model, rank).backward()
        assert all((param.grad is None) == shard_grads for param in model.parameters())
        results.append(values(model))
    assert same(*results)


def accumulation(rank: int) -> None:
    """Two backward passes, with and without no_sync, are one of the summed loss."""
    results = []
    for way in ("no_sync", "several", "sum"):
        model = mlp(torch.float64)
        optimizer = shardadam.AdamW(model.parameters(), shard_grads=True, bucket_bytes=4096)
        for step in range(3):
            seeds = [100 * rank + 2 * step, 100 * rank + 2 * step + 1]
            if way == "sum":
                sum(loss_of(model, seed) for seed in seeds).backward()
            else:
                with optimizer.no_sync() if way == "no_sync" else contextlib.nullcontext():
                    loss_of(model, seeds[0]).backward()
                loss_of(model, seeds[1]).backward()
            optimizer.step()
        results.append(torch.cat([value.flatten() for value in values(model)]))
    # float64 sums in another order; a step's size does not depend on the gradient's.
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[1], results[2], rtol=1e-9, atol=1e-9)


def only_no_sync(rank: int) -> None:
    """All backward passes under no_sync: step() reduces what is left."""
    results = []
    for under in (True, False):
        model = mlp()
        optimizer = shardadam.AdamW(model.parameters(), shard_grads=True)
        with optimizer.no_sync() if under else contextlib.nullcontext():
            loss_of(model, rank).backward()
        optimizer.step()
        results.append(values(model))
    assert same(*results)


def unused(rank: int, options: dict[str, bool]) -> tuple[list[float], list]:
    """Each rank leaves out another layer, one is left out by all."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(20, 20) for _ in range(6)])
    optimizer = shardadam.AdamW(layers.parameters(), bucket_bytes=2048, **options)
    for step in range(3):
        optimizer.zero_grad()
        hidden = torch.randn(4, 20)
        for index, layer in enumerate(layers):
            if index not in (rank, 5):
                hidden = layer(hidden).relu()
        hidden.sum().backward()
        optimizer.step()
        assert step + 1 == optimizer.state[layers[0].weight]["step"]
    return [optimizer.state[layer.weight]["step"].item() for layer in layers], values(layers)


def checkpointed(rank: int) -> None:
    for reentrant in (False, True):
        results = []
        for shard_grads in (False, True):
            model = mlp()
            optimizer = shardadam.AdamW(
                model.parameters(), shard_grads=shard_grads, bucket_bytes=2048
            )
            for step in range(3):
                optimizer.zero_grad()
                batch = torch.randn(
                    8, 30, generator=torch.Generator().manual_seed(10 * step + rank)
                ).requires_grad_()
                hidden = checkpoint(model[:3], batch, use_reentrant=reentrant)
                checkpoint(model[3:], hidden, use_reentrant=reentrant).square().mean().backward()
                optimizer.step()
            results.append(values(model))
        assert same(*results), reentrant


def discarded(rank: int) -> None:
    """The hooks of a discarded optimizer do nothing; two optimizers share a backward pass."""
    model = mlp()
    shardadam.AdamW(model.parameters(), shard_grads=True)
    loss_of(model, rank).backward()
    assert all(param.grad is not None for param in model.parameters())
    first = shardadam.AdamW(model[0].parameters(), shard_grads=True)
    second = shardadam.AdamW(model[2:].parameters(), shard_grads=True)
    for optimizer in (first, second):
        optimizer.zero_grad()
    loss_of(model, rank).backward()
    assert all(param.grad is None for param in model.parameters())
    first.step()
    second.step()


def broken_off(rank: int) -> None:
    """A backward pass that an exception ends, on every rank, leaves nothing behind."""
    results = []
    for breaks in (False, True):
        model = mlp()
        optimizer = shardadam.AdamW(model.parameters(), shard_grads=True, bucket_bytes=1024)
        if breaks:
            handle = model[0].weight.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss_of(model, 99).backward()
            handle.remove()
            optimizer.zero_grad()
        train(model, optimizer, range(rank, rank + 3))
        results.append(values(model))
    assert same(*results)


def half_a_pass(rank: int) -> None:
    """A step on what a backward pass had accumulated until an exception ended it, as in torch."""
    results = []
    for shard_grads in (False, True):
        model = mlp()
        optimizer = shardadam.AdamW(
            model.parameters(), shard_grads=shard_grads, bucket_bytes=25_000, max_grad_norm=1.0
        )
        model[0].bias.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(model, rank).backward()
        model[0].bias.grad = torch.ones(90)
        optimizer.step()
        results.append(values(model))
    assert same(*results)


def grow_and_freeze(rank: int) -> None:
    """Params that are unfrozen, added and frozen along the way."""
    results = []
    for shard_grads in (False, True):
        model = mlp()
        model[0].weight.requires_grad_(False)
        optimizer = shardadam.AdamW(model[0].parameters(), shard_grads=shard_grads)

        def train_all(seeds: range, model=model, optimizer=optimizer) -> None:
            for seed in seeds:
                model.zero_grad()
                train(model, optimizer, range(seed, seed + 1))

        train_all(range(rank, rank + 1))
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
        model[0].weight.requires_grad_(True)
        train_all(range(10 + rank, 13 + rank))
        model[2].bias.requires_grad_(False)
        train_all(range(20 + rank, 22 + rank))
        steps = [
            optimizer.state[param]["step"] for param in (*model[0].parameters(), model[2].bias)
        ]
        assert steps == [5, 6, 3]
        results.append(values(model))
    assert same(*results)


def everything(rank: int) -> tuple[list[float], list]:
    modes_agree(rank)
    accumulation(rank)
    only_no_sync(rank)
    checkpointed(rank)
    discarded(rank)
    broken_off(rank)
    half_a_pass(rank)
    grow_and_freeze(rank)
    plain, sharded = unused(rank, {}), unused(rank, {"shard_grads": True})
    assert plain[0] == sharded[0] and same(plain[1], sharded[1])
    return sharded


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_gradients(world_size):
    results = run_ranks(world_size, everything)
    for steps, params in results:
        assert steps == [3, 3, 3, 3, 3, 0]
        assert same(params, results[0][1])


def crossed(rank: int) -> str:
    """Two optimizers in one backward pass, whose first gradients arrive in another order."""
    torch.manual_seed(0)
    first, second, third = (nn.Linear(20, 20) for _ in range(3))
    options = {"shard_grads": True, "bucket_bytes": 2048}
    outer = shardadam.AdamW([*first.parameters(), *third.parameters()], **options)
    inner = shardadam.AdamW(second.parameters(), **options)
    hidden = second(first(torch.ones(4, 20)))
    if rank == 0:  # third is unused elsewhere
        hidden = third(hidden)
    with pytest.raises(RuntimeError) as caught:
        hidden.sum().backward()
        outer.step()
        inner.step()
    return str(caught.value)


def test_optimizers_that_cross_in_a_backward_pass_are_an_error():
    for message in run_ranks(2, crossed, timeout_s=15):
        assert "different points" in message


def within_ddp(rank: int) -> None:
    """DDP writes its gradients back after ours have been freed: they must not count twice."""
    plain, sharded = mlp(), mlp()
    reference = shardadam.AdamW(plain.parameters(), max_grad_norm=math.inf)
    train(plain, reference, range(rank, rank + 1))
    optimizer = shardadam.AdamW(sharded.parameters(), shard_grads=True, max_grad_norm=math.inf)
    wrapped = nn.parallel.DistributedDataParallel(sharded)
    try:
        train(wrapped, optimizer, range(rank, rank + 1))
    except (ValueError, RuntimeError) as error:
        assert "DDP" in str(error)  # just as good
        return
    torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm)


def test_ddps_gradients_do_not_count_twice():
    run_ranks(2, within_ddp)


def test_full_gradients_never_exist_at_once():
    full = 40 * PARAM_BYTES
    plain = max(run_ranks(2, peak_of_training, {}))
    sharded = max(run_ranks(2, peak_of_training, {"shard_grads": True}))
    # Plain: all gradients, and their fp32 shards. Sharded: the shards, two buckets under way, each
    # packed and received, and what backward makes meanwhile.
    assert plain >= 1.5 * full
    assert sharded <= 0.5 * full + 8 * 1.05 * PARAM_BYTES
