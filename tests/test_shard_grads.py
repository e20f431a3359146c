"""shard_grads=True (ZeRO-2): gradients are reduced and freed during backward."""

import contextlib
import ctypes
import resource

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardadam
from models import loss_of, mlp, same, train, values
from ranks import run_ranks

_M_MMAP_THRESHOLD = -3  # of malloc.h


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


def unused(rank: int) -> list[float]:
    """Each rank leaves out another layer, one is left out by all."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(20, 20) for _ in range(6)])
    optimizer = shardadam.AdamW(layers.parameters(), shard_grads=True, bucket_bytes=2048)
    for step in range(3):
        hidden = torch.randn(4, 20)
        for index, layer in enumerate(layers):
            if index not in (rank, 5):
                hidden = layer(hidden).relu()
        hidden.sum().backward()
        optimizer.step()
        assert step + 1 == optimizer.state[layers[0].weight]["step"]
    return [optimizer.state[layer.weight]["step"].item() for layer in layers]


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


def everything(rank: int) -> list[float]:
    modes_agree(rank)
    accumulation(rank)
    only_no_sync(rank)
    checkpointed(rank)
    discarded(rank)
    return unused(rank)


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_gradients(world_size):
    for steps in run_ranks(world_size, everything):
        assert steps == [3, 3, 3, 3, 3, 0]


def peak(rank: int, shard_grads: bool) -> int:
    """Bytes by which training raises the peak of resident memory."""
    # Let glibc give back what is freed at once, so that the peak is that of what is in use.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 65536)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(40)])
    optimizer = shardadam.AdamW(model.parameters(), shard_grads=shard_grads, bucket_bytes=1 << 22)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        model(torch.randn(2, 1000)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_full_gradients_never_exist_at_once():
    full = 40 * 4_000_000
    plain = max(run_ranks(2, peak, False))
    sharded = max(run_ranks(2, peak, True))
    # Plain: all gradients, and their fp32 shards. Sharded: the shards, and a few buckets.
    assert plain >= 1.5 * full
    assert sharded <= 0.5 * full + 4 * 4_200_000
