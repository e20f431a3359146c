"""Around DDP: gradients are averaged already, and averaging them once more changes nothing."""

import warnings

import torch
from torch.nn.parallel import DistributedDataParallel

import shardadam
from models import mlp, same, train, values
from ranks import run_ranks


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
