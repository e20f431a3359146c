"""One model, distributed over meshes in all ways that tests use."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WIDTH = 53  # of no mesh a multiple


class Net(nn.Module):
    """Norms and linears, as a transformer has them; `up` and `down` can be tensor-parallel."""

    def __init__(self, width: int = WIDTH, hidden: int = 160) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Linear(30, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.end = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        return self.end(x + self.down(self.up(self.norm(x)).relu()))


def fsdp(model: nn.Module, mesh: DeviceMesh, **options: object) -> nn.Module:
    for part in (model.up, model.down):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def on_one_dim(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fsdp(Net().to(dtype), mesh, **options)


def hybrid(dtype: torch.dtype = torch.float32) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fsdp(Net().to(dtype), mesh)


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Some params DTensors, the others plain and the same on all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(Net().to(dtype), mesh, PLAN)


def two_dims(dtype: torch.dtype = torch.float32) -> nn.Module:
    """FSDP2 of tensor-parallel params, on both dims, and of others, on one."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    return fsdp(parallelize_module(Net().to(dtype), mesh["tp"], PLAN), mesh["fsdp"])


WAYS = {
    "fsdp 1": (1, on_one_dim),
    "fsdp 2": (2, on_one_dim),
    "fsdp 4": (4, on_one_dim),
    "hsdp": (4, hybrid),
    "tp": (2, tensor_parallel),
    "fsdp x tp": (4, two_dims),
}


def batch(model: nn.Module, seed: int) -> Tensor:
    values = torch.randn(16, 30, generator=torch.Generator().manual_seed(seed))
    return values.to(next(model.parameters()).dtype)


def backward(model: nn.Module, seed: int) -> Tensor:
    loss = model(batch(model, seed)).square().mean()
    loss.backward()
    return loss.detach()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def fulls(tensors: list[Tensor]) -> list[Tensor]:
    return [full(tensor).clone() for tensor in tensors]


def seed_of(model: nn.Module, step: int) -> int:
    """Ranks that FSDP2 averages over have batches of their own, tensor-parallel ones the same."""
    param = model.up.weight
    mesh = param.device_mesh
    names = mesh.mesh_dim_names or ("fsdp",) * mesh.ndim
    if not hasattr(model, "unshard"):
        return step
    at = [c for c, name in zip(mesh.get_coordinate(), names, strict=True) if name != "tp"]
    return 100 * step + sum(c * 10**i for i, c in enumerate(at))


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)
