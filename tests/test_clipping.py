"""Clipping by the global norm, over ranks, inside the update."""

import math

import pytest
import torch

import shardadam
from models import loss_of, mlp, same, train, values
from ranks import run_ranks


def test_equals_torch_on_one_process():
    for how in ("argument", "method"):
        ours, theirs = mlp(), mlp()
        optimizer = shardadam.AdamW(
            ours.parameters(), max_grad_norm=0.01 if how == "argument" else None
        )
        reference = torch.optim.AdamW(theirs.parameters())
        for step in range(5):
            for model in (ours, theirs):
                model.zero_grad()
                loss_of(model, step).backward()
            expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
            if how == "method":
                assert optimizer.clip_grad_norm_(0.01) == optimizer.grad_norm
            optimizer.step()
            reference.step()
            # Torch adds up squares in float32: relative errors of 2^-24 for each of some thousand.
            assert optimizer.grad_norm.item() == pytest.approx(expected.item(), rel=1e-5)
        for left, right in zip(values(ours), values(theirs), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def over_ranks(rank: int) -> tuple:
    model, theirs = mlp(), mlp()
    optimizer = shardadam.AdamW(model.parameters(), max_grad_norm=0.01)
    loss_of(model, rank).backward()
    optimizer.step()
    (sum(loss_of(theirs, other) for other in range(2)) / 2).backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    return optimizer.grad_norm.item(), expected.item(), values(model)


def test_the_norm_is_that_of_the_mean_over_ranks():
    for norm, expected, _ in run_ranks(2, over_ranks):
        assert norm == pytest.approx(expected, rel=1e-5)


def accumulate_then_clip(rank: int) -> list:
    results = []
    for shard_grads in (False, True):
        model = mlp()
        optimizer = shardadam.AdamW(model.parameters(), shard_grads=shard_grads)
        for step in range(3):
            optimizer.zero_grad()
            with optimizer.no_sync():
                loss_of(model, 10 * step + rank).backward()
            loss_of(model, 100 + 10 * step + rank).backward()
            optimizer.clip_grad_norm_(0.02)
            optimizer.step()
        results.append((values(model), optimizer.grad_norm))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    return results[0][0]


def test_clipping_after_accumulation():
    first, second = run_ranks(2, accumulate_then_clip)
    assert same(first, second)


def test_infinity_measures_and_does_not_clip():
    clipped, plain = mlp(), mlp()
    optimizer = shardadam.AdamW(clipped.parameters(), max_grad_norm=math.inf)
    train(clipped, optimizer, range(3))
    train(plain, shardadam.AdamW(plain.parameters()), range(3))
    assert optimizer.grad_norm > 0
    assert same(values(clipped), values(plain))


def test_non_finite_norms():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    loss_of(model, 0).backward()
    model[0].weight.grad[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="the total norm of the gradients is inf"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    before = values(model)
    optimizer.clip_grad_norm_(1.0)  # as in torch: the others become zero, this one NaN
    optimizer.step()
    assert model[0].weight[0, 0].isnan()
    assert model[2].weight.isfinite().all() and not same(before, values(model))


def test_a_gradient_that_changes_after_clipping_is_an_error():
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters())
    loss_of(model, 0).backward()
    optimizer.clip_grad_norm_(1.0)
    before = values(model)
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match=r"the gradient of \d\.\w+ changed between clip_grad_norm"):
        optimizer.step()
    assert same(before, values(model))
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()


def shards_that_change(rank: int) -> None:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), shard_grads=True)
    loss_of(model, rank).backward()
    optimizer.clip_grad_norm_(1.0)
    loss_of(model, rank).backward()
    with pytest.raises(ValueError, match="changed between clip_grad_norm"):
        optimizer.step()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()


def gradients_beside_the_shards(rank: int) -> None:
    """A backward pass under no_sync after clipping: no shard changes, but there is more to add."""
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), shard_grads=True)
    loss_of(model, rank).backward()
    optimizer.clip_grad_norm_(1.0)
    with optimizer.no_sync():
        loss_of(model, rank).backward()
    before = values(model)
    with pytest.raises(ValueError, match="changed between clip_grad_norm"):
        optimizer.step()
    assert same(before, values(model))


@pytest.mark.parametrize("change", [shards_that_change, gradients_beside_the_shards])
def test_sharded_gradients_that_change_after_clipping_are_an_error(change):
    run_ranks(2, change)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("culprit", [0.0, math.inf, math.nan])
def test_special_norms_are_torchs(culprit, max_norm):
    models, norms = [mlp(), mlp()], []
    for model, package in zip(models, (shardadam, torch.optim), strict=True):
        optimizer = package.AdamW(model.parameters())
        for param in model.parameters():
            param.grad = torch.full_like(param, 1.0 if culprit else 0.0)
        model[0].weight.grad[0, 0] = culprit
        if package is shardadam:
            norms.append(optimizer.clip_grad_norm_(max_norm))
        else:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
    torch.testing.assert_close(*norms, rtol=0, atol=0, equal_nan=True)
    for left, right in zip(*map(values, models), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_clipping_twice_looks_anew():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    loss_of(model, 0).backward()
    first = optimizer.clip_grad_norm_(1.0)
    model[0].weight.grad = None
    assert optimizer.clip_grad_norm_(1.0) < first
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"] == 0
