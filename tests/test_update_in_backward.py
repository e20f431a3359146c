"""update_in_backward=True: a bucket's shard is updated as soon as backward has its gradients."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardadam
from models import loss_of, mlp, same, train, values
from ranks import run_ranks
from test_shard_grads import unused
from training_peak import PARAM_BYTES, peak_of_training


def bitwise_same(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    results = []
    for early in (False, True):
        for gate in (False, True):
            model = mlp(dtype)
            model[2].bias.requires_grad_(False)
            optimizer = shardadam.AdamW(
                model.named_parameters(), update_in_backward=early, bucket_bytes=4096
            )
            if gate:
                optimizer.overlap_gather(model)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)
            for seed in range(100 * rank, 100 * rank + 6):
                loss_of(model, seed).backward()
                if early:
                    assert all(param.grad is None for param in model.parameters())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            optimizer.synchronize()
            results.append(values(model))
    assert all(same(result, results[0]) for result in results)
    return results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_are_the_same_bits(world_size, dtype):
    results = run_ranks(world_size, bitwise_same, dtype)
    assert all(same(result, results[0]) for result in results)


def test_params_that_some_or_all_ranks_leave_out():
    (plain, *_), (early, *_) = (
        run_ranks(2, unused, options) for options in ({}, {"update_in_backward": True})
    )
    assert plain[0] == early[0] == [3, 3, 3, 3, 3, 0]
    assert same(plain[1], early[1])


def accumulation(rank: int) -> None:
    results = []
    for early in (False, True):
        for last_too in (False, True):
            model = mlp()
            optimizer = shardadam.AdamW(
                model.parameters(), update_in_backward=early, bucket_bytes=4096
            )
            for step in range(3):
                with optimizer.no_sync():
                    loss_of(model, 10 * step + rank).backward()
                with optimizer.no_sync() if last_too else contextlib.nullcontext():
                    loss_of(model, 10 * step + 5 + rank).backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append(values(model))
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("world_size", [1, 2])
def test_accumulation_under_no_sync(world_size):
    run_ranks(world_size, accumulation)


def second_backward(rank: int) -> None:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), update_in_backward=True)
    loss_of(model, rank).backward()
    after_one = values(model)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss_of(model, rank).backward()
    assert same(values(model), after_one)
    optimizer.zero_grad()
    train(model, optimizer, range(2))
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) needs all gradients"):
        optimizer.clip_grad_norm_(1.0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_it_can_not_do_is_said(world_size):
    run_ranks(world_size, second_backward)


def broken_off(rank: int) -> None:
    """By an exception on every rank, with buckets under way: nothing of it may count later."""
    results = []
    for breaks in (False, True):
        model = mlp()
        optimizer = shardadam.AdamW(
            model.parameters(), update_in_backward=True, bucket_bytes=0x8000
        )
        if breaks:
            handle = model[0].bias.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss_of(model, 99).backward()
            handle.remove()
            for goes_on in (optimizer.step, loss_of(model, rank).backward):
                with pytest.raises(RuntimeError, match="a backward pass was broken off"):
                    goes_on()
            optimizer.zero_grad()
        train(model, optimizer, range(rank, rank + 3))
        results.append(values(model))
    assert same(*results)


def nested(rank: int) -> None:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), update_in_backward=True, bucket_bytes=0x8000)
    batch = torch.randn(8, 30, requires_grad=True)
    hidden = checkpoint(model[:3], batch, use_reentrant=True)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"no checkpoint\(use_reentrant=True\)"):
        model[3:](hidden).square().mean().backward()
    assert same(values(model), before)
    optimizer.zero_grad()
    train(model, optimizer, range(1))


@pytest.mark.parametrize("world_size", [1, 2])
def test_half_a_backward_pass_is_an_error_until_zero_grad(world_size):
    run_ranks(world_size, nested)
    run_ranks(world_size, broken_off)


def late(rank: int) -> None:
    """Gradients that backward has not updated: of a param that was frozen, and of a later pass."""
    results = []
    for early in (False, True):
        model = mlp()
        model[2].weight.requires_grad_(False)
        optimizer = shardadam.AdamW(model.parameters(), update_in_backward=early)
        train(model, optimizer, range(rank, rank + 1))
        model[2].weight.requires_grad_(True)
        train(model, optimizer, range(rank, rank + 2))
        assert optimizer.state[model[2].weight]["step"] == 2
        results.append(values(model))
    assert same(*results)
    optimizer.zero_grad()
    loss_of(model, rank).backward()
    if rank == 0:
        model[0].weight.grad = torch.ones_like(model[0].weight)
    message = "param 0 of group 0 came after backward" if rank == 0 else "another rank stopped"
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model, rank).backward()
    with optimizer.no_sync():
        loss_of(model, rank).backward()
    with pytest.raises(ValueError, match="all but the last backward pass under no_sync"):
        optimizer.step()


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_gradient_is_passed_over(world_size):
    run_ranks(world_size, late)


def unequal(rank: int) -> None:
    """Said to be equal on all ranks, and then one leaves a layer out, or differs in lr."""
    model = nn.ModuleList([nn.Linear(20, 20) for _ in range(3)])
    optimizer = shardadam.AdamW(
        model.parameters(), update_in_backward=True, bucket_bytes=2048, grad_sync="none"
    )
    torch.manual_seed(0)
    batch = torch.randn(4, 20)
    model[2](model[1](model[0](batch))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.1 * (1 + rank)
    before = values(model)
    with pytest.raises(ValueError, match="rank 0 has lr=0.1 in group 0, rank 1 has lr=0.2"):
        model[0](batch).sum().backward()
    assert same(values(model), before)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="not every rank has gradients for the same params"):
        model[2](model[0](batch) if rank else model[1](batch)).sum().backward()


def test_what_ranks_must_agree_on_is_compared_before_the_update():
    run_ranks(2, unequal, timeout_s=20)


def settled(rank: int) -> None:
    """Without overlap_gather() nobody else waits for params between backward() and step()."""
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), update_in_backward=True)
    loss_of(model, rank).backward()
    assert not optimizer._gathers.under_way


def test_params_are_in_place_after_backward():
    run_ranks(2, settled)


def still_needed(rank: int) -> None:
    weight = nn.Parameter(torch.eye(4))
    optimizer = shardadam.AdamW([weight], update_in_backward=True)
    inputs = torch.ones(1, 4, requires_grad=True)
    hidden = inputs @ weight.detach()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (hidden @ weight).sum().backward()
    optimizer.zero_grad()


def test_a_param_that_backward_still_needs_is_an_error():
    run_ranks(1, still_needed)


def discarded(rank: int) -> None:
    model = mlp()
    shardadam.AdamW(mlp().parameters())  # torch keeps a process's first optimizer for a while
    gc.disable()  # reference counts alone must do
    shardadam.AdamW(model.parameters(), update_in_backward=True)
    loss_of(model, rank).backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_discarded_optimizer_leaves_gradients_alone(world_size):
    run_ranks(world_size, discarded)


def test_global_clipping_is_refused():
    with pytest.raises(ValueError, match="max_grad_norm clips by the norm of all"):
        shardadam.AdamW(mlp().parameters(), update_in_backward=True, max_grad_norm=1.0)


def sparse_on_one_rank(rank: int) -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(10, 8, sparse=rank == 1), "linear": nn.Linear(8, 8)}
    )
    optimizer = shardadam.AdamW(model.named_parameters(), update_in_backward=True)
    message = "table.weight: Adam does not support sparse" if rank else "another rank stopped"
    with pytest.raises(RuntimeError, match=message):
        model["linear"](model["table"](torch.arange(4))).sum().backward()
    with pytest.raises(RuntimeError, match=r"an earlier backward\(\) was broken off"):
        optimizer.step()


def sparse_alone(rank: int) -> None:
    table = nn.Embedding(10, 8, sparse=True)
    optimizer = shardadam.AdamW(table.parameters(), update_in_backward=True)
    with pytest.raises(RuntimeError, match="does not support sparse"):
        table(torch.arange(4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"an earlier backward\(\) was broken off"):
        optimizer.step()


def test_a_bad_gradient_of_one_rank_stops_all():
    run_ranks(2, sparse_on_one_rank)
    run_ranks(1, sparse_alone)


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_full_set_of_gradients_ever_exists(world_size):
    plain = max(run_ranks(world_size, peak_of_training, {}))
    early = max(run_ranks(world_size, peak_of_training, {"update_in_backward": True}))
    assert plain >= 40 * PARAM_BYTES
    # Two buckets under way, each packed, received and averaged, and what is accumulated meanwhile.
    assert early <= 8 * 1.05 * PARAM_BYTES
