"""DTensor params: FSDP2, HSDP, tensor parallelism and both, updated where they are."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import shardadam
from ranks import run_ranks
from shardadam import checkpoint

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


# ---- the update ----------------------------------------------------------------------------------

OPTIONS = {
    "fp32": (torch.float32, {}),
    "clipped": (torch.float32, {"max_grad_norm": 0.05}),
    "bf16": (torch.bfloat16, {}),
    "bf16 and fp32 masters": (torch.bfloat16, {"master": "fp32", "amsgrad": True}),
}


def updates_like_plain(rank: int, way: str) -> None:
    """Given the same gradients, DTensors and plain params get the same bits."""
    for kind in OPTIONS:
        # Beside tensor parallelism plain params are averaged, and bf16 means are rounded once.
        if way != "tp" or not kind.startswith("bf16"):
            updates_like_plain_of(way, kind)


def updates_like_plain_of(way: str, kind: str) -> None:
    dtype, options = OPTIONS[kind]
    model = WAYS[way][1](dtype)
    optimizer = shardadam.AdamW(model.named_parameters(), lr=1e-2, **options)
    plain = [nn.Parameter(value) for value in fulls(list(model.parameters()))]
    reference = shardadam.AdamW(plain, lr=1e-2, grad_sync="none", **options)
    for step in range(4):
        backward(model, seed_of(model, step))
        for param, twin in zip(model.parameters(), plain, strict=True):
            twin.grad = full(param.grad).clone()
        optimizer.step()
        reference.step()
        assert_same(fulls(list(model.parameters())), plain)
        if optimizer.grad_norm is not None:
            # Both sums are exact: whatever the mesh, each element counts once.
            assert torch.equal(optimizer.grad_norm, reference.grad_norm)
            assert optimizer.grad_norm > options["max_grad_norm"]
        optimizer.zero_grad()


@pytest.mark.parametrize("way", WAYS)
def test_updates_as_plain_params_bit_for_bit(way):
    run_ranks(WAYS[way][0], updates_like_plain, way)


def ulp(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.tensor(math.inf)) - values


def like_torch(rank: int, way: str) -> None:
    model = WAYS[way][1]()
    theirs = WAYS[way][1]()
    lr = 1e-2
    optimizer = shardadam.AdamW(model.parameters(), lr=lr)
    other = torch.optim.AdamW(theirs.parameters(), lr=lr, foreach=True)
    steps = 6
    for step in range(steps):
        backward(model, seed_of(model, step))
        for param, twin in zip(model.parameters(), theirs.parameters(), strict=True):
            twin.grad = param.grad.clone()
        optimizer.step()
        other.step()
        optimizer.zero_grad()
    for ours, param in zip(fulls(list(model.parameters())), theirs.parameters(), strict=True):
        # docs/numerics.md: torch is within 5.7 ulp of a float64 step, ours within half of one, of
        # max(|p|, lr); what they differ by in moments is in it.
        bound = steps * 6.2 * ulp(ours.abs().clamp(min=lr))
        assert ((ours - full(param)).abs() <= bound).all()


@pytest.mark.parametrize("way", ["fsdp 2", "hsdp", "fsdp x tp"])
def test_updates_as_torch_does(way):
    run_ranks(WAYS[way][0], like_torch, way)


def clips_like_torch(rank: int, way: str) -> None:
    model = WAYS[way][1]()
    before = fulls(list(model.parameters()))
    optimizer = shardadam.AdamW(model.parameters())
    backward(model, seed_of(model, 0))
    grads = fulls([param.grad for param in model.parameters()])
    expected = torch.cat([grad.flatten() for grad in grads]).double().norm().float()
    norm = optimizer.clip_grad_norm_(0.01)
    torch.testing.assert_close(norm, expected, rtol=2**-23, atol=0)
    optimizer.step()
    clipped = fulls(list(model.parameters()))
    # torch's own clip changes the gradients, which step() then reads: only rounding differs.
    again = WAYS[way][1]()
    assert_same(fulls(list(again.parameters())), before)
    optimizer = shardadam.AdamW(again.parameters())
    backward(again, seed_of(again, 0))
    try:
        torch.nn.utils.clip_grad_norm_(again.parameters(), 0.01)
    except RuntimeError:
        assert way in ("tp", "fsdp x tp")  # torch can't, where params are on different meshes
        return
    optimizer.step()
    for ours, other in zip(clipped, fulls(list(again.parameters())), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_the_norm_is_that_of_all_elements(way):
    run_ranks(WAYS[way][0], clips_like_torch, way)


def coded(rank: int, memory: str) -> None:
    losses = {}
    for kind in (None, memory):
        model = on_one_dim(torch.bfloat16)
        optimizer = shardadam.AdamW(model.parameters(), lr=1e-2, memory=kind)
        losses[kind] = []
        for step in range(30):
            losses[kind].append(float(backward(model, seed_of(model, step))))
            optimizer.step()
            optimizer.zero_grad()
    assert losses[memory][-1] < 0.2 * losses[memory][0]
    assert losses[memory][-1] < 1.5 * losses[None][-1]
    held = sum(t.nbytes for bucket in optimizer._buckets for t in bucket.state.values())
    local = sum(param.to_local().numel() for param in model.parameters())
    padding = sum(bucket.padding_bytes for bucket in optimizer._buckets)
    blocks = sum(-(-param.to_local().numel() // 128) for param in model.parameters())
    per_param = {"lean": 5, "leanest": 3}[memory]
    assert held - padding == per_param * local + 4 * blocks


@pytest.mark.parametrize("memory", ["lean", "leanest"])
def test_coded_state(memory):
    run_ranks(2, coded, memory)


def replicas_draw_alike(rank: int) -> None:
    model = hybrid(torch.bfloat16)
    optimizer = shardadam.AdamW(model.parameters(), lr=1e-2, memory="leanest")
    for step in range(3):
        backward(model, seed_of(model, step))
        optimizer.step()
        optimizer.zero_grad()
    group = model.up.weight.device_mesh["replicate"].get_group()
    for param in model.parameters():
        local = param.to_local().detach().float().contiguous()
        theirs = [torch.empty_like(local) for _ in range(2)]
        dist.all_gather(theirs, local, group=group)
        assert torch.equal(*theirs)


def test_replicas_stay_the_same_with_random_rounding():
    run_ranks(4, replicas_draw_alike)


# ---- gradients -----------------------------------------------------------------------------------


def sums_of_terms(rank: int) -> None:
    """A sequence-parallel norm's gradient is a sum of which every rank has a term."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    norm = parallelize_module(nn.LayerNorm(WIDTH), mesh, SequenceParallel())
    optimizer = shardadam.AdamW(norm.named_parameters(), max_grad_norm=1e6)
    values = torch.randn(2, 8, WIDTH)
    norm(values.chunk(2, 1)[rank]).to_local().square().sum().backward()
    assert norm.weight.grad.placements == (Partial(),)
    whole = nn.LayerNorm(WIDTH)
    whole(values).square().sum().backward()
    optimizer.step()
    expected = torch.cat([whole.weight.grad, whole.bias.grad]).norm()
    torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-5, atol=0)
    exp_avg = optimizer.state[norm.weight]["exp_avg"]
    assert exp_avg.placements == (Replicate(),)
    torch.testing.assert_close(full(exp_avg), 0.1 * whole.weight.grad, rtol=1e-5, atol=1e-7)


def test_gradients_that_are_sums_are_summed():
    run_ranks(2, sums_of_terms)


def accumulates(rank: int) -> None:
    results = []
    for syncs_once in (False, True):
        model = on_one_dim()
        optimizer = shardadam.AdamW(model.parameters())
        for micro in range(2):
            model.set_requires_gradient_sync(not syncs_once or micro == 1)
            backward(model, 10 * rank + micro)
        optimizer.step()
        results.append(fulls(list(model.parameters())))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


def test_accumulation():
    run_ranks(2, accumulates)


def some_have_none(rank: int) -> None:
    model = on_one_dim()
    optimizer = shardadam.AdamW(model.named_parameters())
    backward(model, rank)
    before = fulls(list(model.parameters()))
    if rank == 1:
        model.end.bias.grad = None
    with pytest.raises(ValueError, match=r"end.bias is a DTensor and has a gradient on some ranks"):
        optimizer.step()
    assert_same(fulls(list(model.parameters())), before)
    model.end.bias.grad = None  # on all: it stays, as in torch
    optimizer.step()
    assert torch.equal(full(model.end.bias), before[-1])
    assert not torch.equal(full(model.end.weight), before[-2])
    assert optimizer.state[model.end.bias]["step"] == 0


def test_params_without_gradients():
    run_ranks(2, some_have_none)


def scaled(rank: int) -> None:
    model = on_one_dim()
    optimizer = shardadam.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = fulls(list(model.parameters()))
    for bad in (True, False):
        optimizer.zero_grad()
        loss = model(batch(model, rank)).square().mean()
        scaler.scale(loss).backward()
        if bad and rank == 0:
            model.start.weight.grad.to_local().view(-1)[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        after = fulls(list(model.parameters()))
        if bad:
            assert_same(after, before)
    assert not torch.equal(after[0], before[0])
    assert scaler.get_scale() == 2.0**9  # on both: torch reduces what it found over the mesh


def test_grad_scaler_skips_on_all_ranks():
    run_ranks(2, scaled)


def with_policies(rank: int) -> None:
    model = on_one_dim(
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy(pin_memory=False),
    )
    optimizer = shardadam.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        losses.append(float(backward(model, 2 * step + rank)))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def test_mixed_precision_and_offload_of_fsdp2():
    run_ranks(2, with_policies)


# ---- state ---------------------------------------------------------------------------------------


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


def trained(way: str, kind: str, folder: str | None = None, steps: int = 2):
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


def save(rank: int, way: str, kind: str, folder: str) -> list[Tensor]:
    model, optimizer = trained(way, kind)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    go_on(model, optimizer, 7)
    return fulls(list(model.parameters()))


def load(rank: int, way: str, kind: str, folder: str) -> list[Tensor]:
    model, optimizer = trained(way, kind, steps=1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    go_on(model, optimizer, 7)
    return fulls(list(model.parameters()))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_checkpoint_is_read_at_any_mesh(kind, tmp_path):
    others = {"fsdp 2": ["fsdp 1", "fsdp 4", "fsdp x tp", "fsdp 2"], "fsdp x tp": ["hsdp"]}
    for number, way in enumerate(others):
        folder = str(tmp_path / str(number))
        expected = run_ranks(WAYS[way][0], save, way, kind, folder)[0]
        for other in others[way]:
            for found in run_ranks(WAYS[other][0], load, other, kind, folder):
                assert_same(found, expected)


@pytest.mark.parametrize("kind", ["lean", "leanest"])
def test_a_checkpoint_with_codes_is_read_at_any_mesh(kind, tmp_path):
    folder = str(tmp_path / "saved")
    expected = run_ranks(2, save, "fsdp 2", kind, folder)[0]
    assert_same(run_ranks(2, load, "fsdp 2", kind, folder)[0], expected)  # the same blocks
    for other in ["fsdp 4", "fsdp x tp"]:
        found = run_ranks(4, load, other, kind, folder)[0]
        for ours, theirs in zip(found, expected, strict=True):
            # The moments' codes are rounded once more, in other blocks: an update of lr at most
            # moves by a few of the steps between 8-bit codes, and is rounded to bfloat16.
            bound = 1e-2 * 0.1 + theirs.abs().float() * 2**-7
            assert ((ours.float() - theirs.float()).abs() <= bound).all()


def load_plain(rank: int, folder: str) -> list[Tensor]:
    """What FSDP2's ranks saved, by plain params on any number of ranks, sharded by us."""
    model = Net()
    optimizer = shardadam.AdamW(model.parameters(), lr=1e-2, grad_sync="none")
    go_on(model, optimizer, 0)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    go_on(model, optimizer, 7)
    return fulls(list(model.parameters()))


def load_torch(rank: int, folder: str) -> Tensor:
    model = on_one_dim()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return full(optimizer.state[model.up.weight]["exp_avg"])


def test_a_checkpoint_is_read_by_plain_params_and_by_torch(tmp_path):
    folder = str(tmp_path / "saved")
    expected = run_ranks(2, save, "fsdp 2", "fp32", folder)[0]
    for found in run_ranks(3, load_plain, folder):
        assert_same(found, expected)
    ours = run_ranks(2, moments_of, "fsdp 2")[0]
    assert torch.equal(run_ranks(2, load_torch, folder)[0], ours)


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


# ---- errors --------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"ranks differ: .*gradient of up.bias as DTensor R"):
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
