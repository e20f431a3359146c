"""torch.distributed.checkpoint: masters, the state_dict API, async_save, the tensors themselves."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import shardadam
from checkpointed import advance, assert_same_state, fsdp, make, torch_writes
from models import Awkward, mlp, same, train, values
from ranks import run_ranks
from shardadam.shard_tensor import ShardTensor

pytestmark = pytest.mark.filterwarnings("ignore:gradients are equal")

# ---- masters -------------------------------------------------------------------------------------


def reads_float32(rank: int, folder: str, expected: tuple) -> None:
    """A checkpoint without masters: the params are rounded, and are their own masters."""
    trained = []
    for master in ("split", "fp32"):
        model = mlp(torch.bfloat16, seed=1)
        optimizer = shardadam.AdamW(model.named_parameters(), master=master)
        state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
        with pytest.raises(dcp.CheckpointException, match=r"Missing key .*(remainder|master)"):
            dcp.load(copy.deepcopy(state), checkpoint_id=folder)
        dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
        whole = optimizer.consolidate_state_dict()
        if rank == 0:
            for index, entry in expected[1]["state"].items():
                for name, value in entry.items():
                    assert torch.equal(whole["state"][index][name], value)
            if master == "split":
                assert not any(entry["remainder"].any() for entry in whole["state"].values())
        for name, value in expected[0].items():
            assert torch.equal(model.state_dict()[name], value.bfloat16())
        train(model, optimizer, range(3))
        trained.append(values(model))
    assert same(*trained)


def writes_bfloat16(rank: int, folder: str) -> tuple | None:
    model, optimizer = make("split", bucket_bytes=4096)
    advance(model, optimizer, range(3))
    dcp.save(
        {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=folder,
    )
    whole = optimizer.consolidate_state_dict()
    return None if rank else (copy.deepcopy(model.state_dict()), whole)


def reads_bfloat16(rank: int, folder: str, expected: tuple) -> None:
    for make_optimizer in (torch.optim.AdamW, shardadam.AdamW):
        model = mlp(seed=1)
        optimizer = make_optimizer(model.named_parameters())
        state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optim"])
        for name, value in expected[0].items():
            assert torch.equal(model.state_dict()[name], value.float())
        if make_optimizer is shardadam.AdamW:
            whole = optimizer.consolidate_state_dict()
            if rank == 0:
                for index, entry in whole["state"].items():
                    for name, value in entry.items():
                        assert torch.equal(expected[1]["state"][index][name], value)


def test_with_masters_from_a_checkpoint_without(tmp_path):
    expected = run_ranks(2, torch_writes, str(tmp_path / "c"))[0]
    run_ranks(2, reads_float32, str(tmp_path / "c"), expected)


def test_without_masters_from_a_checkpoint_with(tmp_path):
    expected = run_ranks(2, writes_bfloat16, str(tmp_path / "c"))[0]
    run_ranks(2, reads_bfloat16, str(tmp_path / "c"), expected)


# ---- torch.distributed.checkpoint.state_dict and async_save --------------------------------------


def with_options(rank: int, folder: str) -> None:
    model, optimizer = make("split", bucket_bytes=4096)
    advance(model, optimizer, range(rank, rank + 3))
    whole = optimizer.consolidate_state_dict()
    for number, options in enumerate(
        [
            StateDictOptions(cpu_offload=True),
            StateDictOptions(flatten_optimizer_state_dict=True),
            StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True),
        ]
    ):
        state = get_optimizer_state_dict(model, optimizer, options=options)
        dcp.save(state, checkpoint_id=f"{folder}/{number}")
        other, resumed = make("split", bucket_bytes=9000)
        asked = get_optimizer_state_dict(other, resumed, options=options)
        dcp.load(asked, checkpoint_id=f"{folder}/{number}")
        set_optimizer_state_dict(other, resumed, asked, options=options)
        found = resumed.consolidate_state_dict()
        if rank == 0:
            assert_same_state(found, whole)


def test_options(tmp_path):
    run_ranks(2, with_options, str(tmp_path))


def full_state(rank: int) -> None:
    """torch gathers DTensors only: ours stay what they are, and full ones are taken."""
    full = StateDictOptions(full_state_dict=True)
    model, optimizer = make("split", bucket_bytes=4096)
    advance(model, optimizer, range(3))
    whole = optimizer.consolidate_state_dict()
    state = get_optimizer_state_dict(model, optimizer, options=full)
    other, resumed = make("split", bucket_bytes=4096)
    set_optimizer_state_dict(other, resumed, state, options=full)
    assert isinstance(state["state"]["0.weight"]["exp_avg"], ShardTensor)
    again = resumed.consolidate_state_dict()
    if rank == 0:
        assert_same_state(again, whole)

    reference = mlp(torch.bfloat16)
    theirs = torch.optim.AdamW(reference.parameters())
    train(reference, theirs, range(3))
    state = get_optimizer_state_dict(reference, theirs, options=full)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for options, given in ((full, state), (broadcast, state if rank == 0 else {})):
        other, resumed = make("split", bucket_bytes=4096)
        set_optimizer_state_dict(other, resumed, given, options=options)
        again = resumed.consolidate_state_dict()
        if rank == 0:
            for index, entry in theirs.state_dict()["state"].items():
                for name, value in entry.items():
                    assert torch.equal(again["state"][index][name], value.float())


def test_full_state_dict():
    run_ranks(2, full_state)


def saved_meanwhile(rank: int, folder: str) -> None:
    model, optimizer = make("split", bucket_bytes=4096)
    advance(model, optimizer, range(3))
    whole = optimizer.consolidate_state_dict()
    stagings = {
        "thread": {},
        "blocking": {"async_stager": BlockingAsyncStager()},
        "process": {"async_checkpointer_type": AsyncCheckpointerType.PROCESS},
    }
    for name, options in stagings.items():
        model, optimizer = make("split", bucket_bytes=4096)
        advance(model, optimizer, range(3))
        saving = dcp.async_save(
            {"optim": get_optimizer_state_dict(model, optimizer)},
            checkpoint_id=f"{folder}/{name}",
            **options,
        )
        # Training goes on while it saves; one save at a time, they talk over the same ranks.
        for tensor in optimizer._buckets[0].state.values():
            tensor.fill_(5)
        saving.result()
    for name in stagings:
        model, optimizer = make("split", bucket_bytes=9000)
        asked = {"optim": get_optimizer_state_dict(model, optimizer)}
        dcp.load(asked, checkpoint_id=f"{folder}/{name}")
        set_optimizer_state_dict(model, optimizer, asked["optim"])
        found = optimizer.consolidate_state_dict()
        if rank == 0:
            assert_same_state(found, whole)


def test_async_save(tmp_path):
    run_ranks(2, saved_meanwhile, str(tmp_path))


def in_replicas(rank: int, folder: str) -> None:
    """Two groups of two ranks hold the same shards: each is written once."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters(), process_group=groups[rank // 2])
    train(model, optimizer, range(3))
    dcp.save({"optim": optimizer.state_dict()}, checkpoint_id=folder)
    whole = optimizer.consolidate_state_dict(to=1)
    assert (whole is None) == (rank % 2 == 0)
    other = mlp()
    resumed = shardadam.AdamW(other.named_parameters())  # over all four
    asked = {"optim": resumed.state_dict()}
    dcp.load(asked, checkpoint_id=folder)
    resumed.load_state_dict(asked["optim"])
    found = resumed.consolidate_state_dict(to=1)
    if rank == 1:
        assert_same_state(found, whole)


def test_replicated_groups(tmp_path):
    run_ranks(4, in_replicas, str(tmp_path / "c"))


# ---- the tensors themselves ----------------------------------------------------------------------


def on_their_own(rank: int) -> None:
    model, optimizer = make("split", bucket_bytes=4096)
    new = optimizer.state_dict()
    assert all(not entry["exp_avg"].local.any() for entry in new["state"].values())
    advance(model, optimizer, range(2))
    state = optimizer.state_dict()
    tensor = state["state"][0]["exp_avg"]
    assert isinstance(tensor, ShardTensor) and tensor.shape == model[0].weight.shape
    assert tensor.stride() == model[0].weight.stride()
    assert f"of {tuple(tensor.shape)}" in repr(tensor)
    assert tensor.local.data_ptr() == optimizer.state[model[0].weight]["exp_avg"].data_ptr()
    copied = copy.deepcopy(tensor)
    assert torch.equal(copied, tensor)
    assert copied.local.data_ptr() != tensor.local.data_ptr() or not tensor.local.numel()
    assert torch.equal(tensor.clone().detach().to(torch.float64).to(torch.float32), tensor)
    assert not torch.equal(tensor, state["state"][1]["exp_avg"])
    shared = torch.zeros_like(tensor, device="cpu").share_memory_().copy_(tensor)
    assert torch.equal(shared, tensor) and shared.local.is_shared()
    with pytest.raises(NotImplementedError, match="only a rank's elements are here"):
        tensor + 1
    with pytest.raises(NotImplementedError, match="only a rank's elements are here"):
        torch.zeros(tensor.shape).copy_(tensor)
    through_pickle = pickle.loads(pickle.dumps(state))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    through_a_file = torch.load(buffer, weights_only=True)
    for given in (state, copy.deepcopy(state), through_pickle, through_a_file):
        assert given["state"][0]["step"] == 2
        other, resumed = make("split", bucket_bytes=4096)
        resumed.load_state_dict(given)
        for one, another in zip(optimizer.state.values(), resumed.state.values(), strict=True):
            assert all(torch.equal(one[name], another[name]) for name in one)
    # A param that lies otherwise in memory has its elements in another order.
    model, optimizer = make("awkward", bucket_bytes=4096)
    given = optimizer.state_dict()
    contiguous = Awkward()
    contiguous.last.data = contiguous.last.data.contiguous()
    other = shardadam.AdamW(contiguous.named_parameters(), bucket_bytes=4096)
    if optimizer.state[model.last]["exp_avg"].numel():
        with pytest.raises(ValueError, match="last: .* Expected the same layout"):
            other.load_state_dict(given)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shard_tensors(world_size):
    run_ranks(world_size, on_their_own)


def test_a_dtensor_is_refused(tmp_path):
    run_ranks(1, given_dtensors)


def given_dtensors(rank: int) -> None:
    model, optimizer = fsdp(0)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="0.weight: exp_avg is a DTensor; expected"):
        shardadam.AdamW(mlp().named_parameters()).load_state_dict(optimizer.state_dict())
