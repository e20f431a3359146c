"""torch.distributed.checkpoint: any world size to any other, torch.optim and FSDP2, bit for bit."""

import copy
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

import shardadam
from checkpointed import CODED, KINDS, advance, assert_same_state, fsdp, make, torch_writes
from models import mlp, same, train, values
from ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:gradients are equal")

# Worlds that write, worlds that read.
if os.environ.get("SHARDADAM_TEST_ALL_WORLDS"):
    WRITERS = READERS = [1, 2, 3, 4, 8]
else:
    WRITERS, READERS = [1, 3, 4], [1, 2, 4, 8]

# ---- from any world size to any other ------------------------------------------------------------


def write_all(rank: int, folder: str) -> None:
    whole, shards = {}, {}
    for kind in KINDS | CODED:
        model, optimizer = make(kind, bucket_bytes=2048)
        advance(model, optimizer, range(3 * rank, 3 * rank + 3))
        ids = {"model": model.state_dict(), "optim": optimizer.state_dict()}
        model_state, names = get_state_dict(model, optimizer)
        shards[kind] = {"ids": ids, "names": {"model": model_state, "optim": names}}
        whole[kind] = (model.state_dict(), optimizer.consolidate_state_dict())
    dcp.save(shards, checkpoint_id=f"{folder}/shards")
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pt")


def read_all(rank: int, folders: list[str]) -> None:
    for folder in folders:
        expected = torch.load(f"{folder}/whole.pt")
        for form in ("ids", "names"):
            made = {kind: make(kind, bucket_bytes=5000) for kind in KINDS | CODED}
            asked = {}
            for kind, (model, optimizer) in made.items():
                with torch.no_grad():
                    for param in model.parameters():
                        param.fill_(7)
                optimizer_state = (
                    optimizer.state_dict()
                    if form == "ids"
                    else get_optimizer_state_dict(model, optimizer)
                )
                asked[kind] = {form: {"model": model.state_dict(), "optim": optimizer_state}}
            dcp.load(asked, checkpoint_id=f"{folder}/shards")
            for kind, (model, optimizer) in made.items():
                state = asked[kind][form]
                if form == "ids":
                    model.load_state_dict(state["model"])
                    optimizer.load_state_dict(state["optim"])
                else:
                    set_state_dict(
                        model,
                        optimizer,
                        model_state_dict=state["model"],
                        optim_state_dict=state["optim"],
                    )
                found = optimizer.consolidate_state_dict()
                if rank == 0:
                    assert_same_state(found, expected[kind][1])
                for name, value in expected[kind][0].items():
                    assert torch.equal(model.state_dict()[name], value), (kind, name)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folders = []
    for world_size in WRITERS:
        folders.append(str(tmp_path_factory.mktemp(f"world{world_size}")))
        run_ranks(world_size, write_all, folders[-1])
    return folders


@pytest.mark.fault("{world_size} ranks load what others saved by torch", "the same bits")
@pytest.mark.parametrize("world_size", READERS)
def test_any_world_size_reads_any(written, world_size):
    run_ranks(world_size, read_all, written)


def test_on_disk_is_what_torch_would_write(written, tmp_path):
    """Full shapes under the params' names, and no more boxes than a range needs."""
    for folder, world_size in zip(written, WRITERS, strict=True):
        metadata = dcp.FileSystemReader(f"{folder}/shards").read_metadata()
        for kind, (module, dtype, _, options) in (KINDS | CODED).items():
            plain = kind in KINDS or options.get("state") == "bf16"
            moment = "exp_avg" if plain else "exp_avg_ratio"
            for name, param in module(dtype).named_parameters():
                key = f"{kind}.names.optim.state.{name}.{moment}"
                entry = metadata.state_dict_metadata.get(key)
                assert (entry is not None) == param.requires_grad
                if entry is not None:
                    assert entry.size == param.shape
                    most = world_size * max(2 * param.dim() - 1, 1)
                    assert len(entry.chunks) <= most
        assert not any("shard" in key for key in metadata.state_dict_metadata)
    # One file without any of our code, as torch's own tool makes it.
    dcp_to_torch_save(f"{written[-1]}/shards", tmp_path / "torch.pt")
    found = torch.load(tmp_path / "torch.pt", weights_only=False)
    expected = torch.load(f"{written[-1]}/whole.pt")
    for kind in KINDS:
        by_id = found[kind]["ids"]["optim"]["state"]
        state = {int(index): entry for index, entry in by_id.items()}
        assert_same_state({"state": state}, expected[kind][1])


def goes_on_elsewhere(rank: int, folder: str, resumed: bool) -> list:
    """bf16, with gradients that are the same on all ranks, so that sums of 2 and 4 are exact."""
    model, optimizer = make("split", bucket_bytes=4096 if resumed else 1 << 20)
    if resumed:
        state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optim"])
    else:
        advance(model, optimizer, range(4))
        # An optimizer is a Stateful: torch calls state_dict() itself.
        dcp.save({"model": model, "optim": optimizer}, checkpoint_id=folder)
    advance(model, optimizer, range(4, 9))
    return values(model)


def test_bf16_goes_on_bit_for_bit_at_another_world_size(tmp_path):
    expected = run_ranks(2, goes_on_elsewhere, str(tmp_path / "c"), False)[0]
    for world_size in (1, 4):
        found = run_ranks(world_size, goes_on_elsewhere, str(tmp_path / "c"), True)
        assert all(same(params, expected) for params in found)


# ---- torch.optim and FSDP2 -----------------------------------------------------------------------


def ours_reads(rank: int, folder: str, expected: tuple) -> None:
    model = mlp(seed=1)
    optimizer = shardadam.AdamW(model.named_parameters(), bucket_bytes=9000)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    assert optimizer.param_groups[0]["lr"] == expected[1]["param_groups"][0]["lr"]
    whole = optimizer.consolidate_state_dict()
    if rank == 0:
        assert_same_state(whole, expected[1])
    assert all(torch.equal(model.state_dict()[name], expected[0][name]) for name in expected[0])


def ours_writes(rank: int, folder: str) -> tuple | None:
    model = mlp()
    optimizer = shardadam.AdamW(model.named_parameters(), lr=0.03)
    train(model, optimizer, range(rank, rank + 3))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=folder)
    whole = optimizer.consolidate_state_dict()
    return None if rank else (copy.deepcopy(model.state_dict()), whole)


def torch_reads(rank: int, folder: str, expected: tuple) -> None:
    model = mlp(seed=1)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    assert optimizer.param_groups[0]["lr"] == expected[1]["param_groups"][0]["lr"]
    assert_same_state(optimizer.state_dict(), expected[1])
    assert all(torch.equal(model.state_dict()[name], expected[0][name]) for name in expected[0])
    train(model, optimizer, range(2))


def whole_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
    """FSDP2's state in the form of torch.optim's."""
    options = StateDictOptions(full_state_dict=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    state = dict(enumerate(optimizer_state["state"].values()))
    return model_state, {"state": state, "param_groups": optimizer_state["param_groups"]}


def fsdp_writes(rank: int, folder: str) -> tuple:
    model, optimizer = fsdp(0)
    train(model, optimizer, range(3))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=folder)
    return whole_of(model, optimizer)


def fsdp_reads(rank: int, folder: str, expected: tuple) -> None:
    model, optimizer = fsdp(1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    found = whole_of(model, optimizer)
    assert_same_state(found[1], expected[1])
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])


@pytest.mark.parametrize("world_size", [1, 3])
def test_from_torch_optim(tmp_path, world_size):
    expected = run_ranks(2, torch_writes, str(tmp_path / "c"))[0]
    run_ranks(world_size, ours_reads, str(tmp_path / "c"), expected)


@pytest.mark.parametrize("world_size", [1, 3])
def test_to_torch_optim(tmp_path, world_size):
    expected = run_ranks(world_size, ours_writes, str(tmp_path / "c"))[0]
    run_ranks(2, torch_reads, str(tmp_path / "c"), expected)


def test_from_and_to_fsdp2(tmp_path):
    expected = run_ranks(2, fsdp_writes, str(tmp_path / "theirs"))[0]
    run_ranks(3, ours_reads, str(tmp_path / "theirs"), expected)
    expected = run_ranks(3, ours_writes, str(tmp_path / "ours"))[0]
    run_ranks(2, fsdp_reads, str(tmp_path / "ours"), expected)
