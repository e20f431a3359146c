"""The state of DTensor params: shown, saved, copied and loaded at any mesh."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardadam
from meshes import WAYS, Net, assert_same, backward, full, fulls, on_one_dim, seed_of, two_dims
from ranks import run_ranks


def shows_dtensors(rank: int) -> None:
    model = two_dims()
    optimizer = shardadam.AdamW(model.parameters(), amsgrad=True)
    backward(model, seed_of(model, 0))
    optimizer.step()
    for param in model.parameters():
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            shown = optimizer.state[param][name]
            assert isinstance(shown, DTensor) and shown.shape == param.shape
            assert shown.placements == param.placements
            assert shown.device_mesh == param.device_mesh
    lines = repr(optimizer).splitlines()
    assert "10 DTensors updated where they are" in lines[-1]


def test_state_is_shown_as_dtensors():
    run_ranks(4, shows_dtensors)


def trained(way: str, kind: str, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    dtype, options = SAVED[kind]
    model = WAYS[way][1](dtype) if way in WAYS else Net().to(dtype)
    optimizer = shardadam.AdamW(model.parameters(), lr=1e-2, **options)
    for step in range(steps):
        go_on(model, optimizer, step)
    return model, optimizer


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A step with a gradient that is the same however the model is distributed."""
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = grad
    optimizer.step()


SAVED = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {"amsgrad": True}),
    "lean": (torch.bfloat16, {"memory": "lean"}),
    "leanest": (torch.bfloat16, {"memory": "leanest"}),
}


def save(rank: int, way: str, folder: str) -> dict[str, list[Tensor]]:
    """Save a run of every kind; the params after one more step."""
    went_on = {}
    for kind in SAVED:
        model, optimizer = trained(way, kind)
        dcp.save(state_of(model, optimizer), checkpoint_id=f"{folder}/{kind}")
        go_on(model, optimizer, 7)
        went_on[kind] = fulls(list(model.parameters()))
    return went_on


def load(rank: int, way: str, folder: str) -> dict[str, list[Tensor]]:
    """What `save` returned, by runs that were loaded."""
    went_on = {}
    for kind in SAVED:
        model, optimizer = trained(way, kind, steps=1)
        fill(model, optimizer, f"{folder}/{kind}")
        go_on(model, optimizer, 7)
        went_on[kind] = fulls(list(model.parameters()))
    return went_on


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def fill(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


LOADED = {"fsdp 2": ["fsdp 2", "fsdp 1", "fsdp 4", "fsdp x tp"], "fsdp x tp": ["hsdp"]}


@pytest.mark.parametrize("way", LOADED)
def test_a_checkpoint_is_read_at_any_mesh(way, tmp_path):
    saved = run_ranks(WAYS[way][0], save, way, str(tmp_path))[0]
    for other in LOADED[way]:
        for found in run_ranks(WAYS[other][0], load, other, str(tmp_path)):
            for kind, expected in saved.items():
                if other == way or not kind.startswith("lean"):
                    assert_same(found[kind], expected)
                    continue
                for ours, theirs in zip(found[kind], expected, strict=True):
                    # Codes are rounded once more, in other blocks: an update of at most lr moves
                    # by some of the steps between 8-bit codes, and is rounded to bfloat16.
                    bound = 1e-2 * 0.1 + theirs.abs().float() * 2**-7
                    assert ((ours.float() - theirs.float()).abs() <= bound).all()


def load_plain(rank: int, folder: str) -> list[Tensor]:
    """What FSDP2's ranks saved, by plain params on any number of ranks, sharded by us."""
    model = Net()
    optimizer = shardadam.AdamW(model.parameters(), lr=1e-2, grad_sync="none")
    go_on(model, optimizer, 0)
    fill(model, optimizer, folder)
    go_on(model, optimizer, 7)
    return fulls(list(model.parameters()))


def load_torch(rank: int, folder: str) -> Tensor:
    model = on_one_dim()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fill(model, optimizer, folder)
    return full(optimizer.state[model.up.weight]["exp_avg"])


def test_a_checkpoint_is_read_by_plain_params_and_by_torch(tmp_path):
    expected = run_ranks(2, save, "fsdp 2", str(tmp_path))[0]["fp32"]
    for found in run_ranks(3, load_plain, f"{tmp_path}/fp32"):
        assert_same(found, expected)
    ours = run_ranks(2, moments_of, "fsdp 2")[0]
    assert torch.equal(run_ranks(2, load_torch, f"{tmp_path}/fp32")[0], ours)


def moments_of(rank: int, way: str) -> Tensor:
    model, optimizer = trained(way, "fp32")
    return full(optimizer.state[model.up.weight]["exp_avg"])


def consolidates(rank: int, kind: str) -> None:
    model, optimizer = trained("fsdp x tp", kind)
    whole = optimizer.consolidate_state_dict(to=1)
    assert (whole is None) == (rank != 1)
    shared = [whole]
    dist.broadcast_object_list(shared, src=1)
    plain = Net().to(SAVED[kind][0])
    with torch.no_grad():
        for param, value in zip(plain.parameters(), fulls(list(model.parameters())), strict=True):
            param.copy_(value)
    other = shardadam.AdamW(plain.parameters(), grad_sync="none", **SAVED[kind][1])
    other.load_state_dict(shared[0])
    again, fresh = trained("fsdp x tp", kind, steps=1)
    with torch.no_grad():
        for param, value in zip(again.parameters(), model.parameters(), strict=True):
            param.copy_(value)
    fresh.load_state_dict(shared[0])  # full tensors: each rank takes its own part
    for each, each_optimizer in ((model, optimizer), (plain, other), (again, fresh)):
        go_on(each, each_optimizer, 7)
    assert_same(fulls(list(plain.parameters())), fulls(list(model.parameters())))
    assert_same(fulls(list(again.parameters())), fulls(list(model.parameters())))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_consolidated_state_is_whole(kind):
    run_ranks(4, consolidates, kind)


def consolidated_codes(rank: int, kind: str) -> None:
    """A plain param's codes are of other blocks than a DTensor's: what they stand for is read."""
    plain = Net().to(SAVED[kind][0])
    options = SAVED[kind][1]
    source = shardadam.AdamW(plain.parameters(), lr=1e-2, grad_sync="none", **options)
    go_on(plain, source, 0)
    shared = [source.consolidate_state_dict()]
    dist.broadcast_object_list(shared)
    _, optimizer = trained("fsdp 2", kind, steps=2)
    optimizer.load_state_dict(shared[0])
    found = [optimizer.consolidate_state_dict()]
    dist.broadcast_object_list(found)
    for index, entry in shared[0]["state"].items():
        assert found[0]["state"][index]["step"] == 1
        wanted = entry["exp_avg"]
        error = (found[0]["state"][index]["exp_avg"] - wanted).abs().max()
        # After one step all ratios of moments are of one size, in codes of 8 bits with a sign.
        assert error <= wanted.abs().max() / 127


@pytest.mark.parametrize("kind", ["lean", "leanest"])
def test_consolidated_codes_of_plain_params_are_read(kind):
    run_ranks(2, consolidated_codes, kind)


def follows_its_memory(rank: int) -> None:
    """FSDP2 gives a param another local tensor when a model is loaded into uneven shards."""
    model, optimizer = trained("fsdp 4", "fp32")
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)
    moved = optimizer.param_groups[0]["params"]
    params = list(model.parameters())
    if all(a is b for a, b in zip(moved, params, strict=True)):
        go_on(model, optimizer, 7)
        assert optimizer.state[params[0]]["step"] == 3
    for param in moved:
        param._local_tensor = param._local_tensor.clone()
    before = fulls(moved)
    for param in moved:
        param.grad = param.detach().clone()
    optimizer.step()
    assert not torch.equal(fulls(moved)[0], before[0])


def test_follows_params_to_other_memory():
    run_ranks(4, follows_its_memory)


def copies(rank: int, folder: str) -> None:
    """All that torch can do with its own optimizers of DTensors; with every param's state."""
    model, optimizer = trained("fsdp 2", "bf16")
    file = f"{folder}/{rank}.pt"
    torch.save({"state": optimizer.state_dict(), "optimizer": optimizer}, file)
    saved = torch.load(file, weights_only=False)
    states = [saved["state"], saved["optimizer"].state_dict()]
    params = optimizer.param_groups[0]["params"]
    states.append(copy.deepcopy((params, optimizer))[1].state_dict())
    writing = dcp.async_save(
        state_of(model, optimizer),
        checkpoint_id=f"{folder}/dcp",
        process_group=dist.new_group(backend="gloo"),  # beside what training sends
    )
    expected = copy.deepcopy(optimizer.state_dict())
    go_on(model, optimizer, 7)  # none of them sees it
    writing.result()
    model, optimizer = trained("fsdp 2", "bf16", steps=1)
    fill(model, optimizer, f"{folder}/dcp")
    states.append(optimizer.state_dict())
    for state in states:
        for index, entry in expected["state"].items():
            for name, value in entry.items():
                found = state["state"][index][name]
                assert torch.equal(*(getattr(t, "_local_tensor", t) for t in (found, value)))


def test_state_is_pickled_copied_and_saved_in_the_background(tmp_path):
    run_ranks(2, copies, str(tmp_path))


def offloaded(rank: int) -> None:
    """As FSDP2's CPUOffloadPolicy leaves params: on the host, on a mesh of another device."""
    mesh = DeviceMesh("meta", [0, 1], _init_backend=False)
    with torch.no_grad():
        here = distribute_tensor(torch.ones(6, 4), DeviceMesh("cpu", [0, 1]), [Shard(0)])
        spec = replace(here._spec, mesh=mesh)
    param, grad = (DTensor(torch.ones(3, 4), spec, requires_grad=False) for _ in range(2))
    param = nn.Parameter(param)
    optimizer = shardadam.AdamW([param])
    param.grad = grad
    optimizer.step()
    for state in (optimizer.state[param], optimizer.state_dict()["state"][0]):
        torch.testing.assert_close(state["exp_avg"].to_local(), torch.full((3, 4), 0.1))
    optimizer.state[param]["exp_avg"].to_local().zero_()
    assert not optimizer.state_dict()["state"][0]["exp_avg"].to_local().any()


def test_state_is_shown_where_it_is():
    run_ranks(2, offloaded)
