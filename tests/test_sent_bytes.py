"""A step puts 2·P·(W−1)/W of the params' dtype on the wire from every rank, and a few words."""

import pytest
import torch

import shardadam
from ranks import run_ranks

WIDTH = 256
PARAMS = 4 * WIDTH * WIDTH  # a multiple of 128 elements per rank at each world size: no padding
GRADIENTS, GATHERED = "reduce-scattering gradients", "all-gathering params"


def model(dtype: torch.dtype) -> torch.nn.Module:
    layers = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
    return torch.nn.Sequential(*layers).to(dtype)


def sent_by_a_step(rank: int, dtype: torch.dtype, options: dict) -> dict[str, int]:
    net = model(dtype)
    optimizer = shardadam.AdamW(net.parameters(), bucket_bytes=2 * WIDTH * WIDTH, **options)
    inputs = torch.randn(4, WIDTH).to(dtype)
    before: dict[str, int] = {}
    for _ in range(2):
        before = dict(optimizer._communicator.sent_bytes)
        net(inputs).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = optimizer._communicator.sent_bytes
    return {name: after[name] - before.get(name, 0) for name in after}


def sent_by_kind(rank: int) -> list[tuple[torch.dtype, dict[str, int]]]:
    return [
        (dtype, sent_by_a_step(rank, dtype, {"shard_grads": shard_grads}))
        for dtype in (torch.float32, torch.bfloat16)
        for shard_grads in (False, True)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_sends_the_gradients_and_the_params_once(world_size):
    for kinds in run_ranks(world_size, sent_by_kind):
        for dtype, sent in kinds:
            each = PARAMS * dtype.itemsize * (world_size - 1) // world_size
            assert sent.pop(GRADIENTS, 0) == each
            assert sent.pop(GATHERED, 0) == each
            assert sum(sent.values()) < 1024, sent


def test_a_norm_costs_words_only():
    for sent in run_ranks(2, sent_by_a_step, torch.float32, {"max_grad_norm": 1.0}):
        assert sent.pop(GRADIENTS) == sent.pop(GATHERED) == PARAMS * 4 // 2
        assert 0 < sent["summing the gradient norm"]
        assert sum(sent.values()) < 4096, sent
