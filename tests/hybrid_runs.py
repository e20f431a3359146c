"""Runs of one optimizer over flat ranks and over nodes, whose gradients sum exactly."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardadam


@functools.cache  # of one rank's process
def mesh(nodes: int, places: int) -> DeviceMesh:
    """All ranks as nodes by places."""
    names = ("replicate", "shard")
    return init_device_mesh("cpu", (nodes, places), mesh_dim_names=names)


def over(nodes: int, places: int, replicate_state: bool = False) -> dict[str, Any]:
    """The constructor's arguments."""
    return {"mesh": mesh(nodes, places), "replicate_state": replicate_state}


class Uneven(nn.Module):
    """Params of several buckets; one of them only the first rank has gradients of."""

    def __init__(self, dtype: torch.dtype = torch.float32, fill: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        shapes = {"wide": (40, 71), "bias": (65,), "empty": (0, 3), "some": (333,), "long": (3001,)}
        for name, shape in shapes.items():
            start = torch.randn(shape) if fill is None else torch.full(shape, float(fill))
            setattr(self, name, nn.Parameter(start.to(dtype)))

    def forward(self, seed: int, rank: int) -> Tensor:
        """A loss whose gradients are small integers, other ones on every rank."""
        generator = torch.Generator().manual_seed(100 * seed + rank)
        loss = torch.zeros(())
        for name, param in self.named_parameters():
            weights = torch.randint(-8, 9, param.shape, generator=generator)
            if name != "some" or rank == 0:
                loss = loss + (param * weights.to(param.dtype)).sum()
        return loss


def make(
    dtype: torch.dtype = torch.float32, fill: int | None = None, **options: Any
) -> tuple[Uneven, shardadam.AdamW]:
    """A model, and its optimizer with small buckets."""
    model = Uneven(dtype, fill)
    options = {"lr": 0.05, "bucket_bytes": 9000, **options}
    return model, shardadam.AdamW(model.named_parameters(), **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, seeds: range) -> None:
    """One step per seed."""
    for seed in seeds:
        optimizer.zero_grad()
        model(seed, rank).backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: shardadam.AdamW) -> list[Tensor]:
    """All params and, as every rank's turn comes to have it, all state."""
    whole = {}
    for rank in range(optimizer._communicator.world_size):
        whole = optimizer.consolidate_state_dict(to=rank) or whole
    state = [entry[name] for _, entry in sorted(whole["state"].items()) for name in sorted(entry)]
    return [param.detach().clone() for param in model.parameters()] + state
