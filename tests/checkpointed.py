"""What the tests of checkpoints save, and how they compare it."""

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardadam
from models import Awkward, RealAwkward, mlp, train

KINDS = {
    "awkward": (Awkward, torch.float32, "AdamW", {}),
    "awkward-nadam": (Awkward, torch.float32, "NAdam", {}),
    "awkward-16": (Awkward, torch.bfloat16, "AdamW", {}),
    "amsgrad": (mlp, torch.float32, "Adam", {"amsgrad": True}),
    "float64": (mlp, torch.float64, "AdamW", {}),
    "split": (mlp, torch.bfloat16, "AdamW", {"shard_grads": True}),
    "master": (mlp, torch.bfloat16, "AdamW", {"master": "fp32"}),
    "half": (mlp, torch.float16, "AdamW", {}),
}
CODED = {
    "bf16 state": (mlp, torch.float32, "AdamW", {"state": "bf16"}),
    "lean": (mlp, torch.bfloat16, "AdamW", {"memory": "lean"}),
    "leanest-amsgrad": (mlp, torch.bfloat16, "Adam", {"memory": "leanest", "amsgrad": True}),
    "awkward-q16": (RealAwkward, torch.bfloat16, "NAdam", {"state": "q16", "master": "none"}),
}


def make(kind: str, bucket_bytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    module, dtype, name, options = (KINDS | CODED)[kind]
    model = module(dtype)
    optimizer = getattr(shardadam, name)(
        model.named_parameters(), bucket_bytes=bucket_bytes, **options
    )
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        if isinstance(model, Awkward):
            model.train_a_step(seed)
            optimizer.step()
        else:
            train(model, optimizer, range(seed, seed + 1))


def assert_same_state(found: dict, expected: dict) -> None:
    """Two consolidated state dicts, to the last bit."""
    assert set(found["state"]) == set(expected["state"])
    for index, entry in expected["state"].items():
        assert set(found["state"][index]) == set(entry)
        for name, value in entry.items():
            other = found["state"][index][name]
            assert other.dtype == value.dtype
            assert torch.equal(other, value), (index, name)


def torch_writes(rank: int, folder: str) -> dict:
    model = mlp()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    train(model, optimizer, range(3))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=folder)
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def fsdp(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mlp(seed=seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.named_parameters(), lr=0.02)
