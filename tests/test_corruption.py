"""Flipped bits are found before an update reads them: in one rank's params, and in its state."""

import copy
import ctypes
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shardadam
from meshes import WAYS, seed_of
from meshes import backward as mesh_backward
from models import RealAwkward, loss_of, mlp, same, train, values
from ranks import run_ranks
from shardadam import checkpoint, dtensors
from shardadam.block_sums import block_sums, crc_of

MODES = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {}),
    "lean": (torch.bfloat16, {"memory": "lean"}),
    "leanest": (torch.bfloat16, {"memory": "leanest"}),
    "shard_grads": (torch.float32, {"shard_grads": True}),
    "in backward": (torch.float32, {"update_in_backward": True}),
}


def flip(tensor: Tensor, bit: int = 0, element: int = 0) -> None:
    """Flip a bit through raw memory: torch counts no write."""
    local = dtensors.local_of(tensor)
    byte = local.data_ptr() + element * local.itemsize + bit // 8
    memory = (ctypes.c_ubyte * 1).from_address(byte)
    memory[0] ^= 1 << bit % 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("numel", [128, 300, 5])
def test_every_single_bit_is_seen(dtype, numel):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    # Sums that a bit carries through to the last one.
    for fill in (values.view(torch.uint8), torch.tensor(0xFF), torch.tensor(0)):
        values.view(torch.uint8).copy_(fill.to(torch.uint8))
        sums = block_sums(values)
        assert len(sums) == -(-numel // 128)
        for element in {0, 1, numel // 2, numel - 1}:
            for bit in range(8 * dtype.itemsize):
                flip(values, bit, element)
                changed = block_sums(values)
                assert (changed != sums).nonzero().flatten().tolist() == [element // 128]
                assert crc_of(changed) != crc_of(sums)
                flip(values, bit, element)


def step(model: nn.Module, optimizer: shardadam.AdamW, seed: int) -> None:
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    optimizer.step()


def held(model: nn.Module, optimizer: shardadam.AdamW) -> list[Tensor]:
    """All that an update changes, as bits."""
    optimizer.synchronize()
    state = optimizer.state_dict()["state"].values()
    tensors = [getattr(t, "local", t) for entry in state for t in entry.values()]
    return [t.clone().reshape(-1).view(torch.uint8) for t in [*values(model), *tensors]]


# ---- replicas -----------------------------------------------------------------------------------


def desynchronised(rank: int, mode: str, overlap: bool) -> str:
    dtype, options = MODES[mode]
    model = mlp(dtype)
    optimizer = shardadam.AdamW(
        model.named_parameters(), check_replicas_every=2, bucket_bytes=8000, **options
    )
    if overlap:
        optimizer.overlap_gather(model)
    for seed in range(3):  # before the second and after the third nothing is wrong
        step(model, optimizer, 10 * seed + rank)
    optimizer.synchronize()
    if rank == 1:
        flip(model[2].bias, bit=8 * dtype.itemsize - 2, element=64)
    before = held(model, optimizer)
    with pytest.raises(RuntimeError, match="no longer have the same params") as caught:
        step(model, optimizer, 30 + rank)
    assert same(before, held(model, optimizer))
    # Mended, it goes on.
    if rank == 1:
        flip(model[2].bias, bit=8 * dtype.itemsize - 2, element=64)
    step(model, optimizer, 40 + rank)
    return str(caught.value)


@pytest.mark.fault("a flipped bit in one rank's params, {mode}", "an error that names both")
@pytest.mark.parametrize("mode", MODES)
def test_a_flipped_bit_in_one_copy(mode):
    for message in run_ranks(2, desynchronised, mode, False):
        expected = r"2\.bias has the digest rank 0 ([0-9a-f]{8}), rank 1 ([0-9a-f]{8})\. A memory"
        found = re.search(expected, message)
        assert found and found[1] != found[2], message


@pytest.mark.fault("a flipped bit in one of three ranks' params", "an error that says whose")
def test_the_majority_is_told_and_gathers_under_way_are_awaited():
    for message in run_ranks(3, desynchronised, "fp32", True):
        assert re.search(
            r"2\.bias .* ranks 0, 2 \w+, rank 1 \w+; most ranks agree, rank 1 changed", message
        )


def replicated(rank: int) -> list[str]:
    model = WAYS["hsdp"][1]()
    options = {"check_replicas_every": 1}
    optimizer = shardadam.AdamW(model.named_parameters(), **options)
    messages = []
    for number in range(3):
        optimizer.zero_grad()
        mesh_backward(model, seed_of(model, number))
        if number == 1 and rank == 2:
            flip(model.up.weight, bit=3)
        try:
            optimizer.step()
        except RuntimeError as error:
            messages.append(str(error))
            if rank == 2:
                flip(model.up.weight, bit=3)
    return messages


@pytest.mark.fault("replicas of a DTensor that differ", "an error that names both")
def test_replicas_of_dtensors():
    for messages in run_ranks(4, replicated):
        assert len(messages) == 1
        assert re.search(r"up\.weight has the digest rank 0 \w+, rank 2 \w+\. A", messages[0])


def undisturbed(rank: int, mode: str) -> None:
    """The same bits with both checks as without, and no alarm."""
    dtype, options = MODES[mode]
    found = []
    for checks in ({}, {"check_replicas_every": 1, "check_state": True}):
        model = mlp(dtype)
        optimizer = shardadam.AdamW(
            model.named_parameters(), bucket_bytes=8000, **options, **checks
        )
        if mode == "bf16":
            optimizer.overlap_gather(model)
        train(model, optimizer, range(rank, rank + 4))
        found.append(held(model, optimizer))
    assert same(*found)


@pytest.mark.parametrize("world_size", [1, 2])
def test_checks_change_nothing(world_size):
    run_ranks(world_size, all_of, undisturbed)


def all_of(rank: int, function: Callable[[int, str], None]) -> None:
    for mode in MODES:
        function(rank, mode)


# ---- state --------------------------------------------------------------------------------------


def raises_on_all(rank: int, model: nn.Module, optimizer: shardadam.AdamW, name: str) -> None:
    """A step after what was done to the state of rank 1; it changes nothing."""
    before = held(model, optimizer)
    shown = "the values" if name == "values" else f"'{name}'"
    with pytest.raises(RuntimeError) as caught:
        step(model, optimizer, 30 + rank)
    expected = (
        f"{shown} of 2.weight on rank {max(optimizer._communicator.world_size - 1, 0)} changed"
    )
    assert expected in str(caught.value)
    assert same(before, held(model, optimizer))


def corrupted(rank: int, mode: str) -> None:
    """Every tensor of a param's state in its turn."""
    dtype, options = MODES[mode]
    model = mlp(dtype)
    optimizer = shardadam.AdamW(
        model.named_parameters(), check_state=True, amsgrad=True, bucket_bytes=30_000, **options
    )
    if mode == "bf16":
        optimizer.overlap_gather(model)
    weight, last = model[2].weight, optimizer._communicator.world_size - 1
    for seed in range(2):
        step(model, optimizer, 10 * seed + rank)
    names = ["values", *optimizer.state[weight]]
    assert len(names) >= 5
    for name in names:
        bucket, index = optimizer._places[weight]
        tensor = bucket.shard_piece(index) if name == "values" else optimizer.state[weight][name]
        assert rank != last or tensor.numel()
        if rank == last:
            flip(tensor, bit=3, element=tensor.numel() - 1)
        raises_on_all(rank, model, optimizer, name)
        if rank == last:
            flip(tensor, bit=3, element=tensor.numel() - 1)
        step(model, optimizer, 50 + rank)


@pytest.mark.fault("flipped bits in all state, {world_size} ranks", "an error that names it")
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_flipped_bit_in_the_state(world_size):
    run_ranks(world_size, all_of, corrupted)


def corrupted_dtensors(rank: int) -> None:
    model = WAYS["fsdp 2"][1](torch.bfloat16)
    optimizer = shardadam.AdamW(model.named_parameters(), check_state=True)

    def train_a_step(seed: int) -> None:
        optimizer.zero_grad()
        mesh_backward(model, seed_of(model, seed))
        optimizer.step()

    for seed in range(2):
        train_a_step(seed)
    weight = model.up.weight
    for name in ("values", "exp_avg", "remainder", "step"):
        tensor = weight if name == "values" else optimizer.state[weight][name]
        if rank == 1:
            flip(tensor, bit=2)
        with pytest.raises(RuntimeError, match=r"of up\.weight on rank 1 changed since the last"):
            train_a_step(5)
        if rank == 1:
            flip(tensor, bit=2)
        # What an operation wrote is no corruption; what happened elsewhere still is.
        with torch.no_grad():
            tensor.add_(1)
        if rank == 1:
            flip(optimizer.state[model.down.weight]["exp_avg"], bit=2)
        with pytest.raises(RuntimeError, match=r"'exp_avg' of down\.weight on rank 1"):
            train_a_step(6)
        if rank == 1:
            flip(optimizer.state[model.down.weight]["exp_avg"], bit=2)
        train_a_step(7)


@pytest.mark.fault("flipped bits in the state of DTensors", "an error that names it")
def test_a_flipped_bit_in_the_state_of_dtensors():
    run_ranks(2, corrupted_dtensors)


def in_place_on_state(model: RealAwkward, optimizer: shardadam.AdamW) -> None:
    for entry in optimizer.state.values():
        for name, tensor in entry.items():
            if name.startswith("exp_avg") and tensor.is_floating_point():
                tensor.mul_(0.5)
        entry["step"] += 1


def put_into_state(model: RealAwkward, optimizer: shardadam.AdamW) -> None:
    optimizer.state[model.narrow]["step"] = torch.tensor(5.0)
    optimizer.state[model.last].clear()


def load(model: RealAwkward, optimizer: shardadam.AdamW) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] += 3
    optimizer.load_state_dict(saved)


def write_params(model: RealAwkward, optimizer: shardadam.AdamW) -> None:
    with torch.no_grad():
        model.turned.mul_(0.9)
        model.last[2:] = 1.0
        nn.init.normal_(model.narrow)
        model.sliced.detach().copy_(model.sliced + 1)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def add_params(model: RealAwkward, optimizer: shardadam.AdamW) -> None:
    model.more = nn.Parameter(torch.ones(300))
    optimizer.add_param_group({"params": [("more", model.more)], "amsgrad": True})
    model.frozen.requires_grad_()


def freeze(model: RealAwkward, optimizer: shardadam.AdamW) -> None:
    for param in (model.last, model.scale):
        param.requires_grad_(False)
        param.grad = None


def switch_on_amsgrad(model: RealAwkward, optimizer: shardadam.AdamW) -> None:
    for group in optimizer.param_groups:
        group["amsgrad"] = True


def load_a_checkpoint(model: RealAwkward, optimizer: shardadam.AdamW) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        checkpoint.save(folder, step=1, optimizer=optimizer)
        write_params(model, optimizer)
        in_place_on_state(model, optimizer)
        checkpoint.load(folder, optimizer=optimizer)


WRITES = [
    *(in_place_on_state, put_into_state, load, write_params),
    *(add_params, freeze, switch_on_amsgrad, load_a_checkpoint),
]


@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_is_no_corruption(write, memory):
    model = RealAwkward(torch.bfloat16)
    optimizer = shardadam.AdamW(
        model.named_parameters(), check_state=True, memory=memory, bucket_bytes=2000
    )
    for seed in range(2):
        model.train_a_step(seed)
        optimizer.step()
    write(model, optimizer)
    for seed in range(2, 4):
        model.train_a_step(seed)
        optimizer.step()
    flip(optimizer.state[model.narrow]["remainder"], bit=1)
    model.train_a_step(4)
    with pytest.raises(RuntimeError, match="'remainder' of narrow on rank 0 changed"):
        optimizer.step()


@pytest.mark.fault("a flipped bit in the state, then a save", "an error, nothing saved")
def test_a_checkpoint_is_not_made_of_corrupted_state(tmp_path):
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters(), check_state=True)
    train(model, optimizer, range(2))
    flip(optimizer.state[model[0].weight]["exp_avg_sq"], bit=1)
    with pytest.raises(RuntimeError, match="'exp_avg_sq' of 0.weight on rank 0 changed"):
        checkpoint.save(tmp_path, step=1, optimizer=optimizer)
    assert checkpoint.latest(tmp_path) is None


def test_an_edit_does_not_hide_a_flipped_bit():
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters(), check_state=True)
    train(model, optimizer, range(2))
    flip(optimizer.state[model[0].weight]["exp_avg_sq"], bit=1)
    optimizer.state[model[2].weight]["step"] = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="'exp_avg_sq' of 0.weight on rank 0 changed"):
        optimizer.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"check_replicas_every": 0},
            "Invalid check_replicas_every: 0, expected a number of steps",
        ),
        ({"check_replicas_every": True}, "Invalid check_replicas_every: True"),
        ({"check_state": True, "offload": "."}, "expected one of the two"),
    ],
    ids=str,
)
def test_arguments(options, message, tmp_path):
    if "offload" in options:
        options = {**options, "offload": tmp_path}
    with pytest.raises(ValueError, match=message):
        shardadam.AdamW(mlp().parameters(), **options)
