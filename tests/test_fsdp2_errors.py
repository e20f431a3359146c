"""DTensor params that can't be optimized, and gradients that can't be used: refused by name."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import shardadam
from meshes import PLAN, Net, assert_same, backward, fulls, on_one_dim, seed_of, two_dims
from ranks import run_ranks
from shardadam import checkpoint


def refuses(rank: int, folder: str) -> None:
    model = on_one_dim()
    for option in ("shard_grads", "update_in_backward"):
        with pytest.raises(ValueError, match=rf"start.weight \(DTensor .*{option}=True"):
            shardadam.AdamW(model.named_parameters(), **{option: True})
    optimizer = shardadam.AdamW(model.named_parameters())
    with pytest.raises(checkpoint.CheckpointError, match=r"DTensor: expected torch.distributed"):
        checkpoint.save(folder, step=1, optimizer=optimizer, model=model)
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False))
    with pytest.raises(ValueError, match="expected a param that is sharded or replicated"):
        shardadam.AdamW([partial])
    saved = optimizer.state_dict()
    moved = saved["state"][0]["exp_avg"].redistribute(mesh, [Shard(1)])
    saved["state"][0] = {**saved["state"][0], "exp_avg": moved}
    with pytest.raises(ValueError, match=r"start.weight: expected exp_avg distributed like"):
        optimizer.load_state_dict(saved)
    backward(model, rank)
    moved = model.up.bias.grad.redistribute(mesh, [Replicate()])
    if rank:
        model.up.bias.grad = moved
    with pytest.raises(ValueError, match=r"ranks differ: .*gradient of up.bias as .*DTensor R"):
        optimizer.step()


def test_refusals_name_the_param(tmp_path):
    run_ranks(2, refuses, str(tmp_path))


def older(rank: int) -> None:
    for keeps_params in (False, True):
        model = FullyShardedDataParallel(
            Net(), device_id=torch.device("cpu"), use_orig_params=keeps_params
        )
        with pytest.raises(ValueError, match="belongs to FullyShardedDataParallel"):
            shardadam.AdamW(model.named_parameters())


def test_fsdp1_is_refused():
    run_ranks(2, older)


def stages(rank: int) -> None:
    """Pipeline stages of one shape are different params."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "fsdp"))
    torch.manual_seed(rank // 2)
    stage = fully_shard(nn.Linear(20, 20), mesh=mesh["fsdp"])
    with pytest.raises(ValueError, match=r"the values of bias .* differ between ranks 0 and 2"):
        shardadam.AdamW(stage.named_parameters())
    optimizer = shardadam.AdamW(stage.named_parameters(), process_group=mesh["fsdp"].get_group())
    stage(torch.randn(4, 20)).sum().backward()
    optimizer.step()


def test_pipeline_stages_need_groups_of_their_own():
    run_ranks(4, stages)


def forgotten_mesh(rank: int) -> None:
    """Data parallelism over a mesh dim that nobody averages over."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))
    model = parallelize_module(Net(), mesh["tp"], PLAN)
    optimizer = shardadam.AdamW(model.named_parameters())
    before = fulls(list(model.parameters()))
    backward(model, rank // 2)
    with pytest.raises(ValueError, match=r"the gradient of .* differ between ranks"):
        optimizer.step()
    assert_same(fulls(list(model.parameters())), before)


def test_gradients_that_nobody_averages_are_an_error():
    run_ranks(4, forgotten_mesh)


def missing_on_a_shard(rank: int) -> None:
    """Holders of one shard have no gradient at the first comparison: all compare again."""
    model = two_dims()
    optimizer = shardadam.AdamW(model.named_parameters())
    backward(model, seed_of(model, 0))
    param = model.start.weight  # on two meshes, of one dim each
    grad = param.grad
    if rank >= 2:
        param.grad = None
    with pytest.raises(ValueError, match=r"start.weight is a DTensor and has a gradient on some"):
        optimizer.step()
    param.grad = grad
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_a_gradient_that_a_shard_lacks_leaves_no_rank_waiting():
    run_ranks(4, missing_on_a_shard, timeout_s=40)


def plain_gradient(rank: int) -> None:
    """Set by hand, on one rank only: the others learn of it."""
    model = on_one_dim()
    optimizer = shardadam.AdamW(model.named_parameters())
    before = fulls(list(model.parameters()))
    backward(model, rank)
    if rank == 1:
        model.up.weight.grad = torch.zeros(model.up.weight.shape)
    expected = "another rank stopped" if rank == 0 else "up.weight: expected a gradient like"
    with pytest.raises((ValueError, RuntimeError), match=expected):
        optimizer.step()
    assert_same(fulls(list(model.parameters())), before)


def test_plain_gradients_are_refused_on_all_ranks():
    run_ranks(2, plain_gradient)


class Wrapper(Tensor):
    """Has no memory itself, as what quantizes weights before FSDP2 gathers them."""

    @staticmethod
    def __new__(cls, wrapped: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, wrapped.shape, dtype=wrapped.dtype)

    def __init__(self, wrapped: Tensor) -> None:
        self.wrapped = wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        wrapped = [arg.wrapped if isinstance(arg, cls) else arg for arg in args]
        found = func(*wrapped, **(kwargs or {}))
        return cls(found) if isinstance(found, Tensor) else found


def wrapped(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    plain = nn.Parameter(Wrapper(torch.ones(4, 3)))
    local = DTensor.from_local(Wrapper(torch.ones(4, 3)), mesh, [Shard(0)], run_check=False)
    for param in (plain, nn.Parameter(local)):
        with pytest.raises(ValueError, match=r"weight is.* a Wrapper.* expected a plain tensor"):
            shardadam.AdamW([("weight", param)])


def test_wrappers_of_other_tensors_are_refused():
    run_ranks(2, wrapped)


def group_of_other_ranks(rank: int) -> None:
    """As many as the mesh has, and not those: a rank's shard would stand for another's."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))
    weight = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh["tp"], [Shard(0)]))
    with pytest.raises(ValueError, match=r"weight is distributed also over the ranks \["):
        shardadam.AdamW([("weight", weight)], process_group=mesh["data"].get_group())


def test_a_process_group_of_other_ranks_is_refused():
    run_ranks(4, group_of_other_ranks)


def late_gradients(rank: int) -> None:
    """The first gradient is compared, whenever it comes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))
    params = [
        nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh["tp"], [Shard(0)])) for _ in range(2)
    ]
    optimizer = shardadam.AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    params[1].grad = torch.full_like(params[1], float(1 + rank // 2))
    with pytest.raises(ValueError, match=r"the gradient of param 1 .* differ between ranks"):
        optimizer.step()


def test_gradients_that_come_late_are_compared():
    run_ranks(4, late_gradients)


def smaller_mesh(rank: int) -> None:
    """Ranks that are not on a param's mesh have nothing of it, and step with the others."""
    mesh = DeviceMesh("cpu", [0, 1])
    for placement in (Shard(0), Replicate()):
        weight = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [placement]))
        optimizer = shardadam.AdamW([("weight", weight)], lr=0.5)
        weight.grad = torch.ones_like(weight)
        assert optimizer.clip_grad_norm_(1.0) == torch.tensor(24.0).sqrt()
        optimizer.step()
        if rank < 2:
            assert (weight.to_local() < 0.6).all()
        whole = optimizer.consolidate_state_dict(to=1)
        assert rank != 1 or whole["state"][0]["exp_avg"].shape == (6, 4)
        with pytest.raises(
            (ValueError, RuntimeError), match="expected a rank on the mesh of weight"
        ):
            optimizer.consolidate_state_dict(to=3)


def test_ranks_without_a_param():
    run_ranks(4, smaller_mesh)


def clipped_again(rank: int) -> None:
    """By writing to DTensors, or to their local tensors."""
    model = on_one_dim()
    optimizer = shardadam.AdamW(model.named_parameters())
    for way in ("torch", "by hand"):  # torch's foreach=True counts as no write
        backward(model, rank)
        optimizer.clip_grad_norm_(1e-2)
        if way == "torch":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=False)
        else:
            for param in model.parameters():
                param.grad.to_local().mul_(0.1)
        with pytest.raises(ValueError, match=r"the gradient of .* changed between clip_grad_norm_"):
            optimizer.step()
        optimizer.zero_grad()


def test_gradients_that_change_after_clipping_are_refused():
    run_ranks(2, clipped_again)
