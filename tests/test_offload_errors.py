"""A disk that is full, fails or is not there: every rank raises, and none goes on."""

import errno
import gc
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardadam
from disks import small_disk
from models import mlp, same, train, values
from ranks import run_ranks
from shardadam import slots

pytestmark = pytest.mark.filterwarnings("ignore:gradients are equal")


def limit_files(nbytes: int) -> None:
    """Let no file of this process grow beyond ``nbytes``, nor be written there."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def replace(optimizer: torch.optim.Optimizer, path: str) -> None:
    """Let ``path`` take the place of the state file."""
    fd = os.open(path, os.O_RDWR)
    os.dup2(fd, optimizer._memory._fd)
    os.close(fd)


def size(optimizer: torch.optim.Optimizer) -> int:
    return os.fstat(optimizer._memory._fd).st_size


# ---- at construction -----------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["disk", True, 7])
def test_what_is_no_directory(offload):
    with pytest.raises(ValueError, match="expected 'cpu' or a directory as a pathlib.Path"):
        shardadam.AdamW(mlp().parameters(), offload=offload)


def test_params_that_are_on_the_host_already():
    with pytest.raises(
        ValueError, match=r'0\.weight is on cpu, and offload="cpu" is for params on'
    ):
        shardadam.AdamW(mlp().named_parameters(), offload="cpu")


def test_a_directory_that_is_not_there(tmp_path):
    model = mlp()
    before = [param.data_ptr() for param in model.parameters()]
    with pytest.raises(FileNotFoundError, match="missing"):
        shardadam.AdamW(model.parameters(), offload=tmp_path / "missing")
    assert before == [param.data_ptr() for param in model.parameters()]


def constructs(rank: int, folder: Path) -> str:
    model = mlp()
    before = [param.data_ptr() for param in model.parameters()]
    if rank == 1:
        limit_files(30_000)
    with pytest.raises((OSError, RuntimeError)) as caught:
        shardadam.AdamW(model.parameters(), offload=folder)
    limit_files(resource.RLIM_INFINITY)
    assert before == [param.data_ptr() for param in model.parameters()]
    optimizer = shardadam.AdamW(model.parameters(), offload=folder)
    train(model, optimizer, range(1))

    more = mlp(seed=2)  # the same for another group
    held = size(optimizer)
    if rank == 0:
        limit_files(held + 4096)
    with pytest.raises((OSError, RuntimeError)):
        optimizer.add_param_group({"params": more.parameters()})
    limit_files(resource.RLIM_INFINITY)
    assert size(optimizer) == held or rank == 1
    train(model, optimizer, range(1, 2))

    if rank == 0:  # and for AMSGrad's maximum
        limit_files(held + 4096)
    for group in optimizer.param_groups:
        group["amsgrad"] = True
    before = values(model)
    with pytest.raises((OSError, RuntimeError)):
        train(model, optimizer, range(2, 3))
    assert same(values(model), before)
    limit_files(resource.RLIM_INFINITY)
    train(model, optimizer, range(2, 3))
    assert not same(values(model), before)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_no_room_on_one_rank(tmp_path):
    other, culprit = run_ranks(2, constructs, tmp_path)
    assert culprit.startswith(f"OSError: [Errno {errno.EFBIG}] ")
    assert f" bytes of state can't be reserved in {tmp_path}: File too large" in culprit
    assert other.startswith("RuntimeError: another rank stopped before construction of the opt")
    assert culprit in other


def updates_in_backward(rank: int, folder: Path) -> str:
    """AMSGrad's maximum finds no room: every rank is told in its backward pass."""
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), offload=folder, update_in_backward=True)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["amsgrad"] = True
    before = values(model)
    if rank == 1:
        limit_files(size(optimizer) + 4096)
    with pytest.raises((OSError, RuntimeError)) as caught:
        train(model, optimizer, range(1, 2))
    limit_files(resource.RLIM_INFINITY)
    assert same(values(model), before)
    train(model, optimizer, range(1, 2))
    assert not same(values(model), before)
    return str(caught.value)


def test_no_room_in_a_backward_pass_that_updates(tmp_path):
    other, culprit = run_ranks(2, updates_in_backward, tmp_path)
    assert f" bytes of state can't be reserved in {tmp_path}: File too large" in culprit
    assert culprit in other and other.startswith("another rank stopped before")


def differs(rank: int, folder: Path) -> None:
    with pytest.raises(
        ValueError, match="rank 0 has offload to a directory, rank 1 has offload = N"
    ):
        shardadam.AdamW(mlp().parameters(), offload=None if rank else folder)
    own = folder / str(rank)
    own.mkdir()
    shardadam.AdamW(mlp().parameters(), offload=own)


def test_ranks_offload_alike_but_for_the_directory(tmp_path):
    run_ranks(2, differs, tmp_path)


@pytest.mark.fault("offload: a disk that is full", "an error on every rank")
def test_a_full_disk(tmp_path):
    with small_disk(tmp_path, "64k"):
        with pytest.raises(OSError, match=r"\d+,\d+ bytes of .*: No space left") as caught:
            shardadam.AdamW(mlp().parameters(), offload=tmp_path)
        assert caught.value.errno == errno.ENOSPC
        del caught
        gc.collect()
        assert os.statvfs(tmp_path).f_bfree == os.statvfs(tmp_path).f_blocks


# ---- in a step -----------------------------------------------------------------------------------

# What the state file turns into, and what the system then says. /dev/full reads zeros and has no
# room; of /proc/self/mem, the first pages can't be read; /dev/null is at its end.
FAULTS = {
    "/dev/full": "No space left on device",
    "/proc/self/mem": "Input/output error",
    "/dev/null": "was cut off",
}
WAYS = {
    "plain": {"bucket_bytes": 9000},
    "sharded": {"bucket_bytes": 9000, "shard_grads": True},
    "in backward": {"bucket_bytes": 9000, "update_in_backward": True},
}


def breaks(rank: int, folder: Path, fault: str, overlapped: bool, culprit: int) -> list[str]:
    found = []
    for way in WAYS.values():
        model = mlp()
        optimizer = shardadam.AdamW(model.parameters(), offload=folder, **way)
        if overlapped:
            optimizer.overlap_gather(model)
        train(model, optimizer, range(2))
        if rank == culprit:
            replace(optimizer, fault)
        with pytest.raises((OSError, RuntimeError)) as caught:
            train(model, optimizer, range(2, 3))
        found.append(f"{type(caught.value).__name__}: {caught.value}")
        for use in (optimizer.step, optimizer.consolidate_state_dict):
            with pytest.raises(RuntimeError, match="an earlier step\\(\\) was broken off by"):
                optimizer.zero_grad()
                use()
        del optimizer, caught
    return found


@pytest.mark.fault("offload in a step: {fault}", "an error on every rank")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fails_in_a_step(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "SLOT_BYTES", 20_000)
    for overlapped in (False, True):
        other, culprit = run_ranks(2, breaks, tmp_path, fault, overlapped, 1)
        assert all(re.match(f"OSError: .*{FAULTS[fault]}", error) for error in culprit), culprit
        for theirs, error in zip(other, culprit, strict=True):
            assert theirs == (
                f"RuntimeError: another rank stopped before the end of the update: rank 1: {error}"
            )


def test_a_disk_that_fails_on_a_rank_alone(tmp_path):
    for error in run_ranks(1, breaks, tmp_path, "/dev/full", False, 0)[0]:
        expected = f"[Errno {errno.ENOSPC}] state can't be written in {tmp_path}: No space left on "
        assert error == f"OSError: {expected}device"


def test_a_killed_process_leaves_nothing(tmp_path):
    script = (
        "import os, pathlib, signal, torch, shardadam\n"
        "param = torch.nn.Parameter(torch.ones(300_000))\n"
        f"optimizer = shardadam.AdamW([param], offload=pathlib.Path({str(tmp_path)!r}))\n"
        "param.sum().backward()\n"
        "optimizer.step()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -9
    assert not any(tmp_path.iterdir())
