"""What `offload="cpu"` is made of, with the CPU in the GPU's place: plain copies, no streams."""

from functools import partial

import pytest
import torch

import shardadam
from models import RealAwkward, loss_of, mlp, same, train, values
from ranks import run_ranks
from shardadam import sharded_params, slots
from shardadam.host_slot import HostSlot
from shardadam.kernels import OnHost, backend_for
from shardadam.offload import Place
from shardadam.storage import DeviceMemory
from shardadam.streaming import Streamed
from shimmed_cuda import shimmed_cuda
from test_offload import FORMS, WAYS, assert_equal_states

pytestmark = pytest.mark.filterwarnings("ignore:gradients are equal")


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    """Several windows to a bucket of `mlp`."""
    monkeypatch.setattr(slots, "SLOT_BYTES", 10_000)


def host_slots(options, device, backend):
    """As `place_for_state` on a GPU, but for the pinned memory."""
    on_host = OnHost(backend_for(device, threads=1), backend)
    return Place(on_host, DeviceMemory(device), Streamed(partial(HostSlot, device), on_host))


def trained(rank: int, offloaded: bool, form: dict, way: dict, dtype: torch.dtype) -> tuple:
    with pytest.MonkeyPatch.context() as patch:
        if offloaded:
            patch.setattr(sharded_params, "place_for_state", host_slots)
        model = mlp(dtype)
        optimizer = shardadam.AdamW(model.parameters(), lr=0.01, **form, **way)
        assert isinstance(optimizer._updater, Streamed) == offloaded
        for seed in range(4):
            model[2].bias.requires_grad_(seed != 1)
            loss_of(model, seed + 10 * rank).backward()
            optimizer.step()
            optimizer.zero_grad()
    return values(model), optimizer.consolidate_state_dict()


def all_ways(rank: int, offloaded: bool) -> list[tuple]:
    return [
        trained(rank, offloaded, form, way, torch.bfloat16)
        for form in FORMS.values()
        for way in WAYS.values()
    ] + [trained(rank, offloaded, {}, {}, dtype) for dtype in (torch.float16, torch.float64)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_bits(world_size):
    ours, theirs = (run_ranks(world_size, all_ways, offloaded) for offloaded in (True, False))
    for one, other in zip(ours, theirs, strict=True):
        for (params, state), (expected, held) in zip(one, other, strict=True):
            assert same(params, expected)
            if state is not None:
                assert_equal_states(state, held)


def test_awkward_params(monkeypatch):
    models = [RealAwkward(), RealAwkward()]
    for model in models:
        optimizer = shardadam.NAdam(model.parameters(), lr=0.1, state="q8")
        for seed in range(3):
            model.train_a_step(seed)
            optimizer.step()
        monkeypatch.setattr(sharded_params, "place_for_state", host_slots)
    assert same(*map(values, models))


def test_norms_and_loss_scales_of_the_device(monkeypatch):
    """The device measures and the host updates, counts and skips."""
    scaled, plain = mlp(), mlp()
    reference = shardadam.AdamW(plain.parameters(), max_grad_norm=0.02)
    device, kernels = shimmed_cuda()
    monkeypatch.setattr(sharded_params, "backend_for", lambda _: device)
    monkeypatch.setattr(sharded_params, "place_for_state", host_slots)
    optimizer = shardadam.AdamW(scaled.parameters(), max_grad_norm=0.02)
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        optimizer.zero_grad()
        amp.scale(loss_of(scaled, step)).backward()
        if step == 2:
            scaled[0].weight.grad[0, 0] = float("inf")
        amp.step(optimizer)
        amp.update()
        if step != 2:
            train(plain, reference, range(step, step + 1))
            assert optimizer.grad_norm == reference.grad_norm
    assert same(values(scaled), values(plain))
    assert optimizer.state[scaled[0].weight]["step"] == 4
    assert set(kernels.launched) == {"shardadam_sum_squares", "shardadam_root"}
    assert "on the host, norms by" in repr(optimizer)
