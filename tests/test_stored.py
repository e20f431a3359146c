"""Checkpoints of older versions (tests/stored): read in every format, to the last bit, and gone on.

A version that is not known is an error that says so, and no checkpoint to be skipped.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from checkpointed import assert_same_state
from models import mlp
from ranks import run_ranks
from saved_runs import step
from shardadam import AdamW, checkpoint
from shardadam.checkpoint import manifest
from shardadam.checkpoint.errors import CheckpointError
from stored_runs import STEPS, STORED, built, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:gradients are equal"),
    pytest.mark.filterwarnings("ignore:.*Please use DTensor instead"),
]


def from_ours(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    found = checkpoint.load(folder / "ours", optimizer=optimizer, model=model, rng=False)
    assert found.step == STEPS and not found.skipped


def from_dcp(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )


def from_one_file(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    saved = torch.load(folder / "whole.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optim"])


def assert_same(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    expected, found = torch.load(file, weights_only=True), snapshot(model, optimizer)
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    if found["optim"] is not None:
        assert_same_state(found["optim"], expected["optim"])


def read(rank: int, runs: list[Path], kind: str) -> None:
    for folder in runs:
        for load in (from_ours, from_dcp, from_one_file):
            model, optimizer = built(kind)
            step(optimizer, range(100, 101))  # so that nothing is as it was saved
            load(folder, model, optimizer)
            assert_same(model, optimizer, folder / "whole.pt")
            step(optimizer, range(STEPS, STEPS + 1))
            assert_same(model, optimizer, folder / "after.pt")


ARCHIVES = sorted(STORED.glob("*.tar.xz"))


@pytest.mark.fault("checkpoints of an older version, {archive.name}", "the same bits")
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def test_what_was_stored_is_read_and_goes_on(archive, tmp_path):
    with tarfile.open(archive) as stored:
        stored.extractall(tmp_path, filter="data")
    kinds = {folder.name.rpartition("-")[0] for folder in tmp_path.iterdir()}
    assert kinds >= {"fp32", "amsgrad", "split"}
    for kind in sorted(kinds):
        runs = [tmp_path / f"{kind}-{world_size}" for world_size in (1, 2)]
        for world_size in (1, 2):
            run_ranks(world_size, read, runs, kind)


def test_there_are_archives_of_three_commits():
    assert len(ARCHIVES) >= 3


def save_two(rank: int, folder: Path) -> None:
    """Step 2 as a newer version would have written it."""
    model = mlp()
    optimizer = AdamW(model.named_parameters())
    for number in (1, 2):
        checkpoint.save(folder, step=number, optimizer=optimizer, model=model)
    if rank == 0:
        file = folder / "step-00000002" / manifest.FILE
        value = json.loads(file.read_bytes())["manifest"]
        value["version"] = manifest.VERSION + 1
        value["something new"] = True
        file.write_bytes(manifest.seal(json.dumps(value).encode()))


def load_newer(rank: int, folder: Path) -> None:
    model = mlp(seed=1)
    optimizer = AdamW(model.named_parameters())
    before = snapshot(model, optimizer)
    expected = (
        rf"step-00000002/manifest\.json: format version: expected {manifest.VERSION} "
        rf"\(a newer shardadam may read it\), found {manifest.VERSION + 1}"
    )
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.load(folder, optimizer=optimizer, model=model)
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.latest(folder)
    after = snapshot(model, optimizer)
    assert all(torch.equal(after["model"][name], before["model"][name]) for name in after["model"])


@pytest.mark.fault("a checkpoint of a newer version, W = {world_size}", "an error, nothing loaded")
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_newer_version_is_an_error_and_no_older_checkpoint_is_taken(world_size, tmp_path):
    run_ranks(world_size, save_two, tmp_path)
    run_ranks(world_size, load_newer, tmp_path)
