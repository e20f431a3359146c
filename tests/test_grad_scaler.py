"""torch.amp.GradScaler: every rank skips a step or none does."""

import warnings

import pytest
import torch

import shardadam
from models import loss_of, mlp, same, train, values
from ranks import run_ranks

INF = float("inf")


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def test_scaling_and_skipping_change_nothing_else():
    scaled, plain = mlp(), mlp()
    optimizer = shardadam.AdamW(scaled.parameters(), max_grad_norm=0.02)
    reference = shardadam.AdamW(plain.parameters(), max_grad_norm=0.02)
    amp = scaler()
    for step in range(6):
        optimizer.zero_grad()
        amp.scale(loss_of(scaled, step)).backward()
        if step == 2:
            scaled[0].weight.grad[0, 0] = INF
        before = values(scaled)
        amp.step(optimizer)
        amp.update()
        if step == 2:
            assert same(before, values(scaled))
        else:
            train(plain, reference, range(step, step + 1))
        assert optimizer.grad_norm == reference.grad_norm
    assert amp.get_scale() == 512.0
    # A power of two comes off exactly.
    assert same(values(scaled), values(plain))


def overflow_on_one_rank(rank: int, unscale: bool, dtype: torch.dtype) -> tuple:
    model, plain = mlp(dtype), mlp(dtype)
    optimizer = shardadam.AdamW(model.parameters(), lr=1e-4)
    reference = shardadam.AdamW(plain.parameters(), lr=1e-4)
    amp = scaler()
    for step in range(8):
        optimizer.zero_grad()
        amp.scale(loss_of(model, 10 * step + rank)).backward()
        overflow = step == 3
        if overflow and rank == 1:
            model[0].weight.grad[0, 0] = INF
        if unscale:
            amp.unscale_(optimizer)
            optimizer.clip_grad_norm_(1e9)
        before = values(model)
        amp.step(optimizer)
        amp.update()
        if overflow:
            assert same(before, values(model))
        else:
            train(plain, reference, range(10 * step + rank, 10 * step + rank + 1))
    return values(model), values(plain), amp.get_scale()


@pytest.mark.fault("not finite on one rank, unscale_() {unscale}", "all skip the step")
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_on_one_rank_skips_on_all(unscale):
    first, second = run_ranks(2, overflow_on_one_rank, unscale, torch.float32)
    assert (first[2], second[2]) == (1024.0, 512.0)
    assert same(first[0], second[0])
    # From then on gradients of different scales meet. They are powers of two apart.
    assert same(first[0], first[1])


def test_float16_params():
    first, second = run_ranks(2, overflow_on_one_rank, False, torch.float16)
    assert same(first[0], second[0])
    for scaled, plain in zip(first[0], first[1], strict=True):
        # Unscaled gradients are subnormal in float16 in places, where they lose bits.
        torch.testing.assert_close(scaled, plain, rtol=0.01, atol=2e-3)


def sharded_gradients(rank: int) -> str:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), shard_grads=True)
    amp = scaler()
    amp.scale(loss_of(model, rank)).backward()
    with pytest.raises(RuntimeError, match="expected neither with GradScaler") as caught:
        amp.step(optimizer)
    return str(caught.value)


def test_sharded_gradients_say_that_a_scaler_finds_none():
    with warnings.catch_warnings():
        assert len(run_ranks(2, sharded_gradients)) == 2


def test_one_rank_shards_no_gradients_so_a_scaler_finds_them():
    models = [mlp(), mlp()]
    for model, shard_grads in zip(models, (False, True), strict=True):
        optimizer = shardadam.AdamW(model.parameters(), shard_grads=shard_grads)
        amp = scaler()
        for step in range(3):
            optimizer.zero_grad()
            amp.scale(loss_of(model, step)).backward()
            amp.step(optimizer)
            amp.update()
    assert same(*map(values, models))
