"""Around DDP: gradients are averaged already, and averaging them once more changes nothing."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import shardadam
from models import loss_of, mlp, same, train, values
from ranks import run_ranks
from shardadam.integrations import ddp


def in_ddp(rank: int) -> tuple:
    results = []
    for grad_sync in ("mean", "none"):
        model = mlp()
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=grad_sync == "none")
        optimizer = shardadam.AdamW(model.parameters(), grad_sync=grad_sync, max_grad_norm=0.05)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(wrapped, optimizer, range(rank, rank + 4))
        hints = [w for w in caught if "equal on all ranks already" in str(w.message)]
        assert len(hints) == (grad_sync == "mean" and rank == 0)
        results.append(values(model))
    # The mean of two equal numbers is that number.
    assert same(*results)
    theirs = mlp()
    wrapped = DistributedDataParallel(theirs)
    optimizer = torch.optim.AdamW(theirs.parameters())

    def clip(*_: object) -> None:
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)

    optimizer.register_step_pre_hook(clip)
    train(wrapped, optimizer, range(rank, rank + 4))
    for ours, other in zip(results[0], values(theirs), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    return results[0]


def test_ddp_is_redundant_and_right():
    first, second = run_ranks(2, in_ddp)
    assert same(first, second)


# ---- the communication hook ----------------------------------------------------------------------

WAYS = {
    "default": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 0.005},
}


class Branches(nn.Module):
    """Uses one branch or the other, by the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(30, 90)
        self.branches = nn.ModuleList(nn.Linear(90, 40) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branches[x[0, 0] > 0](self.trunk(x))


def hooked(model: nn.Module, way: str = "default", **options) -> tuple:
    wrapped = DistributedDataParallel(model, **WAYS[way])
    optimizer = shardadam.AdamW(model.parameters(), bucket_bytes=8192, **options)
    wrapped.register_comm_hook(optimizer, ddp.reduce_scatter)
    return wrapped, optimizer


def as_without_a_wrapper(rank: int, way: str) -> None:
    for make in (mlp, Branches) if way == "unused" else (mlp,):
        model, plain = make(), make()
        wrapped, optimizer = hooked(model, way, max_grad_norm=0.05)
        alone = shardadam.AdamW(plain.parameters(), bucket_bytes=8192, max_grad_norm=0.05)
        for module, by in ((wrapped, optimizer), (plain, alone)):
            train(module, by, range(rank, rank + 5))
        assert same(values(model), values(plain))
        assert torch.equal(optimizer.grad_norm, alone.grad_norm)
        if make is Branches:
            continue  # all buckets are reduced in backward, also those without gradients
        sent, expected = optimizer._communicator.sent_bytes, alone._communicator.sent_bytes
        for doing in ("reduce-scattering gradients", "all-gathering params"):
            assert sent[doing] == expected[doing] > 0


@pytest.mark.filterwarnings("ignore:find_unused_parameters")
@pytest.mark.parametrize("way", WAYS)
def test_the_hook_is_as_no_wrapper(way):
    """Also in bytes: what DDP sends besides would be more than its own broadcasts, see below."""
    run_ranks(2, as_without_a_wrapper, way)


def all_reduces(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, range(rank, rank + 2))
    names = {event.key for event in profile.key_averages()}
    return [name for name in names if "allreduce" in name.lower().replace("_", "")]


def sends(rank: int) -> None:
    """With the hook DDP's reducer sends nothing: its backend is never asked to reduce."""
    assert not all_reduces(*hooked(mlp()), rank)
    theirs = DistributedDataParallel(mlp())
    assert all_reduces(theirs, torch.optim.AdamW(theirs.parameters()), rank)


def test_ddp_itself_reduces_nothing():
    run_ranks(2, sends)


def accumulates(rank: int) -> None:
    for inside in (True, False):
        model, plain = mlp(), mlp()
        wrapped, optimizer = hooked(model)
        alone = shardadam.AdamW(plain.parameters(), bucket_bytes=8192)
        for step in range(3):
            for part in range(3):
                skip = wrapped.no_sync() if inside and part < 2 else contextlib.nullcontext()
                with skip:
                    loss_of(wrapped, 10 * step + 3 * part + rank).backward()
                loss_of(plain, 10 * step + 3 * part + rank).backward()
            for by in (optimizer, alone):
                by.clip_grad_norm_(0.05)
                by.step()
                by.zero_grad()
        assert same(values(model), values(plain))


def test_accumulating_with_and_without_no_sync():
    run_ranks(2, accumulates)


def runs_out(rank: int, ours: bool) -> list:
    model = mlp()
    if ours:
        wrapped, optimizer = hooked(model)
        joinables = [wrapped, ddp.Joined(optimizer)]
    else:
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters())
        joinables = [wrapped]
    with Join(joinables):
        for seed in range(3 + 3 * rank):
            loss_of(wrapped, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
    return values(model)


@pytest.mark.fault("uneven inputs, with Join", "the right result")
def test_ranks_that_run_out_of_inputs():
    ours, theirs = run_ranks(3, runs_out, True), run_ranks(3, runs_out, False)
    assert same(ours[0], ours[1]) and same(ours[0], ours[2])
    for left, right in zip(ours[0], theirs[2], strict=True):
        # Nine steps of AdamW in float32 arithmetic, lr = 1e-3.
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def refuses(rank: int) -> None:
    for options in ({"shard_grads": True}, {"update_in_backward": True}, {"grad_sync": "none"}):
        wrapped, optimizer = hooked(mlp(), **options)
        with pytest.raises(
            ValueError, match=r"expected neither with DDP's hook|grad_sync=\"mean\""
        ):
            loss_of(wrapped, 0).backward()
    model = mlp()
    wrapped, optimizer = hooked(model)
    loss_of(wrapped, rank).backward()
    before = values(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match="changed after backward had reduced it"):
        optimizer.step()
    assert same(values(model), before)
    optimizer.zero_grad()
    train(wrapped, optimizer, range(2))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(wrapped, rank)).backward()
    with pytest.raises(RuntimeError, match="may differ in scale: expected DDP without the hook"):
        scaler.step(optimizer)


def test_what_the_hook_refuses():
    run_ranks(2, refuses)


def test_one_rank_has_nothing_to_reduce():
    run_ranks(1, lambda rank: train(*hooked(mlp()), range(3)))
