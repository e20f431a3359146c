"""DTensors: the params that FSDP2 and tensor parallelism have distributed over a mesh of ranks.

What a rank has of one is its *local* tensor. Whoever distributed it also reduces its gradient, so
that nothing is left to exchange but what has to be known of all elements, such as their norm.
"""

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, TypeGuard

import torch
from torch import Tensor

DTensor = Any
"""torch.distributed.tensor.DTensor, which takes a second to import: who has one has paid."""


_local = attrgetter("_local_tensor")


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is one. Others need not import torch.distributed.tensor for the answer."""
    return hasattr(tensor, "device_mesh")


def local_of(tensor: Tensor) -> Tensor:
    """This rank's elements, or the tensor itself if it is no DTensor."""
    local = getattr(tensor, "_local_tensor", tensor)
    # A collective of the backward pass may be under way: a kernel reads memory, and does not wait.
    wait: Any = getattr(local, "wait", None)
    found: Tensor = local if wait is None else wait()
    return found


def locals_of(tensors: Sequence[DTensor]) -> list[Tensor]:
    """As `local_of` each, in a third of the time."""
    found = list(map(_local, tensors))
    return found if set(map(type, found)) == {Tensor} else list(map(local_of, tensors))


def like(param: DTensor, local: Tensor) -> DTensor:
    """``local``, shaped like that of ``param``, as a DTensor that is distributed as it is.

    The same memory, wherever that is: from_local would copy to the mesh's device what is offloaded.
    """
    spec = param._spec
    meta = spec.tensor_meta._replace(dtype=local.dtype)
    # torch takes a DTensor whose local tensor does not begin its storage for one that has memory
    # itself, and then can't copy, pickle or stage it.
    local = torch.from_dlpack(local)  # type: ignore[attr-defined]
    return type(param)(local, replace(spec, tensor_meta=meta), requires_grad=False)


def full(tensor: DTensor) -> Tensor:
    """All of its elements, on every rank. Collective over its mesh."""
    # The mesh may have a backend for its own device only.
    local = local_of(tensor).to(tensor.device_mesh.device_type)
    if local.dtype == torch.int16:  # which neither gloo nor NCCL sends
        local = local.view(torch.float16)
    found: Tensor = like(tensor, local).full_tensor().view(tensor.dtype)
    return found


def same_mesh(tensor: Tensor, param: DTensor) -> bool:
    """Whether ``tensor`` is a DTensor on the mesh of ``param``."""
    return is_dtensor(tensor) and bool(tensor.device_mesh == param.device_mesh)


def same_placement(tensor: Tensor, param: DTensor) -> bool:
    """Whether the ranks have the same elements of both."""
    alike = same_mesh(tensor, param) and tensor.shape == param.shape
    return alike and bool(getattr(tensor, "placements", None) == param.placements)


def local_part(param: DTensor, full: Tensor) -> Tensor:
    """Of ``full``, which has the shape of ``param``, what this rank has of ``param``: a view.

    Sends nothing, where torch's distribute_tensor may.
    """
    mesh, coordinate = param.device_mesh, param.device_mesh.get_coordinate()
    if coordinate is None:
        return full.new_empty(0)
    for dim, placement in enumerate(param.placements):
        if placement.is_shard() or hasattr(placement, "split_factor"):
            shards, _ = placement._split_tensor(
                full, mesh.size(dim), with_padding=False, contiguous=False
            )
            full = shards[coordinate[dim]]
    return full


def shard_of(param: DTensor) -> tuple[int, ...]:
    """Where on the mesh this rank's elements are, but for the dims in which they are replicated.

    Empty on a rank that is not on the mesh.
    """
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:
        return ()
    return tuple(
        -1 if placement.is_replicate() else at
        for at, placement in zip(coordinate, param.placements, strict=True)
    )


def shard_number(param: DTensor) -> int:
    """This rank's shard among all different ones, in the order of the mesh."""
    number = 0
    for dim, at in enumerate(shard_of(param)):
        if at >= 0:
            number = number * param.device_mesh.size(dim) + at
    return number


def ranks_of(param: DTensor) -> tuple[int, ...]:
    """The global ranks of its mesh, in ascending order."""
    return tuple(sorted(param.device_mesh.mesh.flatten().tolist()))


def redistributed(grad: DTensor, param: DTensor) -> Tensor:
    """The local tensor of ``grad`` distributed as ``param`` is. Collective over the mesh."""
    return local_of(grad.redistribute(param.device_mesh, param.placements))


def describe(tensor: DTensor) -> str:
    """On what mesh, and how, for errors; the same on every rank."""
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or [f"dim {dim}" for dim in range(mesh.ndim)]
    dims = [
        f"{placement} over {name} ({mesh.size(dim)})"
        for dim, (name, placement) in enumerate(zip(names, tensor.placements, strict=True))
    ]
    return "DTensor " + ", ".join(dims)


def is_partial(param: DTensor) -> bool:
    """Whether its elements are sums that have not been made."""
    return any(placement.is_partial() for placement in param.placements)


def is_sharded_only(param: DTensor) -> bool:
    """Whether every rank of its mesh has elements of its own."""
    return not any(placement.is_replicate() for placement in param.placements)
