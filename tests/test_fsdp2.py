"""DTensor params: FSDP2, HSDP, tensor parallelism and both, updated where they are."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import shardadam
from meshes import (
    WAYS,
    WIDTH,
    assert_same,
    backward,
    batch,
    full,
    fulls,
    hybrid,
    on_one_dim,
    seed_of,
)
from ranks import run_ranks

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
