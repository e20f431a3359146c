"""What `stats()` and profiles say of a step."""

import time

import torch
import torch.distributed as dist

import shardadam
from models import loss_of, mlp, train, train_scaled
from ranks import run_ranks

PHASES = {"meet", "reduce", "clip", "update", "gather"}


def counts(rank: int) -> None:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), max_grad_norm=1.0)
    assert optimizer.stats()["steps"] == 0 and optimizer.stats()["grad_norm"] is None
    sent = sum(optimizer.stats()["sent_bytes"].values())
    start = time.perf_counter()
    train(model, optimizer, range(5))
    took = time.perf_counter() - start
    stats = optimizer.stats()
    assert stats["steps"] == 5 and stats["skipped"] == 0
    assert stats["grad_norm"] == float(optimizer.grad_norm)
    assert set(stats["seconds"]) == PHASES
    assert 0 < sum(stats["seconds"].values()) < took
    # On two ranks each sends half of the gradients and half of the params, and some words.
    numel = sum(bucket.bucket.numel for bucket in optimizer._buckets)
    payload = 5 * 2 * 4 * numel // 2
    assert payload < sum(stats["sent_bytes"].values()) - sent < payload + 5 * 2000


def test_steps_bytes_and_seconds_are_counted():
    run_ranks(2, counts)


def waits(rank: int) -> float:
    """The rank that comes first waits in "meet"."""
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    before = optimizer.stats()["seconds"]["meet"]
    loss_of(model, 1).backward()
    dist.barrier()
    if rank == 1:
        time.sleep(0.5)
    optimizer.step()
    return optimizer.stats()["seconds"]["meet"] - before


def test_waiting_for_a_late_rank_is_told_from_work():
    first, late = run_ranks(2, waits)
    assert first > 0.4 > late


def test_skipped_steps_are_counted():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train_scaled(model, optimizer, [True, False, False])
    assert (optimizer.stats()["steps"], optimizer.stats()["skipped"]) == (3, 1)


def test_profiles_show_the_phases():
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    with torch.profiler.profile() as profile:
        train(model, optimizer, range(2))
    ranges = {event.key: event.count for event in profile.key_averages()}
    assert {name: ranges.get(f"shardadam.{name}") for name in PHASES} == dict.fromkeys(PHASES, 2)
