"""Whole optimizers with the CUDA kernels run on the CPU: the CPU backend's bits, and no waiting.

What this can't show: cuda_on_cpu/shim.h.
"""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import shardadam
from kernel_runs import BF16, FP32, FP64
from models import loss_of, mlp, same, train, values
from shardadam import sharded_params
from shimmed_cuda import shimmed_cuda


@pytest.fixture
def on_shim(monkeypatch):
    """Optimizers made by ``make`` use the CUDA backend, on CPU tensors."""

    def make(cls, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(sharded_params, "backend_for", lambda device: shimmed_cuda()[0])
            return cls(*args, **kwargs)

    return make


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16, FP64], ids=str)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (shardadam.AdamW, {}),
        (shardadam.AdamW, {"max_grad_norm": 0.05, "maximize": True}),
        (shardadam.Adam, {"weight_decay": 0.1, "amsgrad": True, "max_grad_norm": 0.05}),
        (shardadam.NAdam, {"weight_decay": 0.01}),
    ],
    ids=str,
)
def test_training_equals_the_cpu_backend(cls, options, dtype, on_shim):
    trains_as_the_cpu_backend(cls, options, dtype, on_shim)


@pytest.mark.parametrize(
    ("cls", "options", "dtype"),
    [
        (shardadam.AdamW, {"memory": "lean", "max_grad_norm": 0.05}, BF16),
        (shardadam.AdamW, {"memory": "leanest", "bucket_bytes": 4096}, BF16),
        (shardadam.Adam, {"memory": "leanest", "amsgrad": True, "weight_decay": 0.1}, BF16),
        (shardadam.NAdam, {"state": "bf16", "master": "none"}, BF16),
        (shardadam.AdamW, {"state": "q16"}, FP32),
        (shardadam.AdamW, {"state": "q8"}, torch.float16),
    ],
    ids=str,
)
def test_training_with_coded_state_equals_the_cpu_backend(cls, options, dtype, on_shim):
    trains_as_the_cpu_backend(cls, options, dtype, on_shim)


def trains_as_the_cpu_backend(cls, options, dtype, on_shim):
    ours, theirs = mlp(dtype), mlp(dtype)
    device = on_shim(cls, ours.parameters(), **options)
    host = cls(theirs.parameters(), **options)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (device, host)]
    for step in range(6):
        for model, optimizer in ((ours, device), (theirs, host)):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if step in (2, 3):
                model[0].bias.grad = None  # its step does not count
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        assert device.grad_norm == host.grad_norm
    assert same(values(ours), values(theirs))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        for name, value in host.state[other].items():
            assert torch.equal(device.state[mine][name], value), name
    assert device.state[ours[0].bias]["step"] == 4


def test_loss_scaling_is_decided_on_the_device(on_shim):
    scaled, plain = mlp(), mlp()
    device = on_shim(shardadam.AdamW, scaled.parameters(), max_grad_norm=0.02)
    host = shardadam.AdamW(plain.parameters(), max_grad_norm=0.02)
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        device.zero_grad()
        amp.scale(loss_of(scaled, step)).backward()
        if step == 2:
            scaled[0].weight.grad[0, 0] = float("inf")
        amp.step(device)
        amp.update()
        if step != 2:
            host.zero_grad()
            loss_of(plain, step).backward()
            host.step()
    assert amp.get_scale() == 512.0
    assert same(values(scaled), values(plain))
    assert device.state[scaled[0].weight]["step"] == 5


class NoWaiting(TorchDispatchMode):
    """On a GPU these would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero")
        assert func.overloadpacket.__name__ not in waits, func
        return func(*args, **kwargs or {})


def test_a_step_waits_for_nothing(on_shim, monkeypatch):
    def waits(self):
        raise AssertionError("tolist")

    for cls, options in (
        (shardadam.AdamW, {"max_grad_norm": 0.02}),
        (shardadam.NAdam, {"lr": torch.tensor(1e-3)}),
        (shardadam.AdamW, {"state": "q16"}),
    ):
        model = mlp()
        optimizer = on_shim(cls, model.parameters(), **options)
        amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            amp.scale(loss_of(model, step)).backward()
            if step == 1:
                model[0].bias.grad = None
            optimizer.grad_scale = amp._get_scale_async()
            optimizer.found_inf = torch.zeros(())
            host_lr = optimizer.param_groups[0]["lr"]
            with monkeypatch.context() as patch:
                # A tensor on the device is read there; here it only stands in for one.
                patch.setattr(torch.Tensor, "tolist", waits)
                patch.setattr(type(optimizer), "_hyperparameters", read_on_device(optimizer))
                with NoWaiting():
                    optimizer.clip_grad_norm_(0.1) if step == 2 else None
                    optimizer.step()
                    optimizer.zero_grad()
            assert optimizer.param_groups[0]["lr"] is host_lr


def read_on_device(optimizer):
    """`_hyperparameters` as it is for a learning rate on a GPU."""
    original = type(optimizer)._hyperparameters

    def hyperparameters(self, group):
        lr = group["lr"]
        if not isinstance(lr, torch.Tensor):
            return original(self, group)
        return dataclasses.replace(original(self, {**group, "lr": 0.0}), lr=lr)

    return hyperparameters


def test_state_moves_between_the_backends(on_shim):
    first, second = mlp(), mlp()
    host = shardadam.AdamW(first.parameters())
    for step in range(3):
        host.zero_grad()
        loss_of(first, step).backward()
        if step == 1:
            first[0].bias.grad = None
        host.step()
    with torch.no_grad():
        for mine, other in zip(second.parameters(), first.parameters(), strict=True):
            mine.copy_(other)
    device = on_shim(shardadam.AdamW, second.parameters())
    device.load_state_dict(host.state_dict())
    for model, optimizer in ((first, host), (second, device)):
        optimizer.zero_grad()
        loss_of(model, 9).backward()
        optimizer.step()
    assert same(values(first), values(second))
    host.load_state_dict(device.state_dict())
    assert host.state[first[0].bias]["step"] == 3


def test_a_counter_written_to_by_hand_is_seen(on_shim):
    first, second = mlp(), mlp()
    optimizers = (
        on_shim(shardadam.AdamW, first.parameters()),
        shardadam.AdamW(second.parameters()),
    )
    for model, optimizer in zip((first, second), optimizers, strict=True):
        train(model, optimizer, range(3))
        optimizer.state[model[2].bias]["step"].fill_(40)  # in place, under the host's nose
        train(model, optimizer, range(3, 5))
        optimizer.state[model[0].weight]["step"] = torch.tensor(7.0)
        train(model, optimizer, range(5, 7))
    assert same(values(first), values(second))
