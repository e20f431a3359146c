"""The ways that only NCCL takes, over gloo: no GPU is needed to find out that they are right."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import shardadam
from models import mlp, same, train, values
from ranks import run_ranks
from shardadam.collectives import Communicator


def train_over(rank: int, dtype: torch.dtype, shard_grads: bool) -> tuple[list, list]:
    """Params after training by NCCL's way and by gloo's."""
    results = []
    for backend in ("nccl", "gloo"):
        model = mlp(dtype)
        optimizer = shardadam.AdamW(
            model.parameters(), shard_grads=shard_grads, bucket_bytes=4096, max_grad_norm=0.1
        )
        optimizer._communicator.backend = backend
        train(model, optimizer, range(10 * rank, 10 * rank + 4))
        results.append(values(model))
    return tuple(results)


@pytest.mark.parametrize("shard_grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nccl_and_gloo_ways_agree(dtype, shard_grads):
    # Two ranks: the sum of two numbers has no order.
    (first, expected), (second, _) = run_ranks(2, train_over, dtype, shard_grads)
    assert same(first, second)
    assert same(first, expected)


def agree_on_words(rank: int) -> tuple[list[int], list[int]]:
    ranks = Communicator(None, torch.device("cpu"))
    for _ in range(20):  # a rank that is quick may be two ahead
        ranks.agree([0])
    return ranks.agree([rank, 7, 2**62 - rank])


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_words_are_agreed_on_by_few_ranks_and_by_more(world_size):
    last = world_size - 1
    for low, high in run_ranks(world_size, agree_on_words):
        assert low == [0, 7, 2**62 - last]
        assert high == [last, 7, 2**62]


def agree_without_a_cpu_backend(rank: int) -> bool:
    pair = dist.new_group([0, 1])
    communicator = Communicator(None, torch.device("cpu"))
    communicator.device = torch.device("cuda")  # as in a group that takes GPU tensors only
    made, device = communicator._find_host_group({"cuda": "nccl"})
    again, _ = communicator._find_host_group({"cuda": "nccl"})
    total = torch.tensor([rank])
    dist.all_reduce(total, group=made)
    assert made is again and made is not None and device.type == "cpu" and total == 3
    both = {"cpu": "gloo", "cuda": "nccl"}
    assert communicator._find_host_group(both) == (None, torch.device("cpu"))
    if rank < 2:
        part = Communicator(pair, torch.device("cpu"))
        part.device = torch.device("cuda")
        assert part._find_host_group({"cuda": "nccl"}) == (pair, torch.device("cuda"))
        assert part._find_host_group(both) == (pair, torch.device("cpu"))
    return True


def test_what_the_host_must_know_does_not_wait_for_a_gpu():
    assert all(run_ranks(3, agree_without_a_cpu_backend))


def groups_of_their_own(rank: int) -> str:
    """Ranks of different numbers of groups: where torch's new_group() waits for ever."""
    pairs = dist.new_group([0, 1]), dist.new_group([1, 2])
    everybody = Communicator(None, torch.device("cpu")).aside()
    assert everybody.gather_bytes(bytes([rank])) == [b"\0", b"\1", b"\2"]
    if rank == 2:
        return ""
    with pytest.raises(RuntimeError) as caught:
        Communicator(pairs[0], torch.device("cpu")).aside()
    return str(caught.value)


def test_a_group_aside_is_made_or_refused_by_all():
    first, second, _ = run_ranks(3, groups_of_their_own)
    assert first == second
    assert "they belong to different numbers of groups (3 to 4)" in first


def timeouts(rank: int) -> list[float]:
    """Of groups that are made beside another one: on the host for GPUs, and for another thread."""
    cpu = torch.device("cpu")
    world = Communicator(None, cpu)
    others = Communicator(dist.new_group(timeout=timedelta(seconds=70)), cpu)
    asides = [ranks.aside().process_group for ranks in (world, others)]
    world.device = torch.device("cuda")
    groups = [*asides, world._find_host_group({"cuda": "nccl"})[0]]
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in groups]


def test_groups_that_are_made_wait_as_long_as_those_beside_them():
    assert run_ranks(2, timeouts, peer_timeout_s=50) == [[50, 70, 50]] * 2
