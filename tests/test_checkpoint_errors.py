"""A checkpoint that can't be written: one error on all ranks, and the last good one stands."""

import errno
import multiprocessing
import os
import re
import resource
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardadam
from disks import small_disk
from models import mlp, same, values
from ranks import run_ranks
from saved_runs import step
from shardadam import checkpoint
from shardadam.checkpoint import folders, saving, tensorfile

os_open = os.open
FAULTS = {
    "write": (tensorfile, "write_all", errno.EIO),
    "sync": (os, "fsync", errno.EIO),
    "open": (tensorfile.os, "open", errno.EACCES),
    "mkdir": (Path, "mkdir", errno.EROFS),
    "rename": (os, "rename", errno.EIO),
}


def built() -> tuple:
    model = mlp()
    return model, shardadam.AdamW(model.parameters(), bucket_bytes=8192)


def newest(folder: str) -> tuple[int, list]:
    model, optimizer = built()
    found = checkpoint.load(folder, optimizer=optimizer, model=model)
    return found.step, values(model)


def faults(rank: int, folder: str) -> dict:
    model, optimizer = built()
    step(optimizer, range(2))
    checkpoint.save(folder, step=2, optimizer=optimizer, model=model)
    good = values(model)
    step(optimizer, range(2, 4))
    seen = {}
    for name, (owner, function, number) in FAULTS.items():
        for culprit in range(dist.get_world_size()):
            for asynchronous in (False, True):
                if name == "rename" and culprit:
                    continue  # only the first rank renames
                real = getattr(owner, function)

                def broken(*args, number=number, real=real, **options):
                    if real is os_open and not args[1] & os.O_CREAT:
                        return real(*args, **options)
                    raise OSError(number, os.strerror(number), "the file")

                if rank == culprit:
                    setattr(owner, function, broken)
                start = time.monotonic()
                with pytest.raises(OSError) as caught:
                    if asynchronous:
                        saved = checkpoint.async_save(
                            folder, step=4, optimizer=optimizer, model=model, keep=1
                        )
                        saved.wait()
                    else:
                        checkpoint.save(folder, step=4, optimizer=optimizer, model=model, keep=1)
                setattr(owner, function, real)
                assert time.monotonic() - start < 10
                assert caught.value.errno == number
                seen[name, culprit, asynchronous] = str(caught.value)
                assert f"rank {culprit} of 2" in str(caught.value)
    found, params = newest(folder)
    assert found == 2
    assert same(params, good)
    # All is well again.
    checkpoint.save(folder, step=4, optimizer=optimizer, model=model, keep=1)
    assert newest(folder)[0] == 4
    return seen


@pytest.mark.filterwarnings("ignore:gradients are equal")
@pytest.mark.fault("a file limit, an I/O error on one rank in a save", "an error on every rank")
def test_one_ranks_failure_is_everybodys(tmp_path):
    first, second = run_ranks(2, faults, str(tmp_path))
    assert len(first) == 2 * (2 * len(FAULTS) - 1)
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def too_large(rank: int, folder: str, limited: bool) -> str:
    model, optimizer = built()
    checkpoint.save(folder, step=1, optimizer=optimizer, model=model)
    if limited and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError) as caught:
        for number in range(2, 40):
            checkpoint.save(folder, step=number, optimizer=optimizer, model=model)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert newest(folder)[0] == number - 1
    return f"{caught.value.errno} {caught.value}"


def test_a_file_over_the_limit(tmp_path):
    first, second = run_ranks(2, too_large, str(tmp_path), True)
    assert first == second
    assert first.startswith(f"{errno.EFBIG} [Errno {errno.EFBIG}] rank 1 of 2: File too large")


@pytest.mark.fault("a disk that is full in a save", "an error on every rank")
def test_a_full_disk(tmp_path):
    with small_disk(tmp_path, "3m"):
        first, second = run_ranks(2, too_large, str(tmp_path), False)
        assert first == second
        assert re.search("No space left on device", first)
        assert not list(tmp_path.glob(".writing*"))


def dies(rank: int, folder: str) -> None:
    model, optimizer = built()
    checkpoint.save(folder, step=1, optimizer=optimizer, model=model)
    dist.barrier()
    if rank == 1:
        time.sleep(0.2)
        tensorfile.write_all = lambda *_: os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="has a peer died"):
        checkpoint.save(folder, step=2, optimizer=optimizer, model=model)
    assert time.monotonic() - start < 10
    assert checkpoint.latest(folder).name == "step-00000001"
    raise AssertionError("this rank was right")


@pytest.mark.fault("kill in a save", "an error, the last one whole")
def test_a_rank_that_dies_while_saving(tmp_path):
    with pytest.raises(AssertionError, match="this rank was right"):
        run_ranks(2, dies, str(tmp_path))


def differs(rank: int, folder: str, difference: str) -> None:
    model, optimizer = built()
    if difference == "step":
        with pytest.raises(
            checkpoint.CheckpointError, match="rank 0 has step 5.*rank 1 has step 6"
        ):
            checkpoint.save(folder, step=5 + rank, optimizer=optimizer)
    elif difference == "model":
        given = {"model": mlp()} if rank else {}
        with pytest.raises(checkpoint.CheckpointError, match="expected to save the same on every"):
            checkpoint.save(folder, step=5, optimizer=optimizer, **given)
    elif difference == "extras":
        extras = {"bad": object()} if rank == 1 else {}
        with pytest.raises(checkpoint.CheckpointError, match=r"rank 1 of 2: extras\['bad'\]"):
            checkpoint.save(folder, step=5, optimizer=optimizer, extras=extras)
    elif difference == "where they are":
        with pytest.raises(RuntimeError, match="rank 0 is in saving a checkpoint.*, rank 1 .*step"):
            if rank == 0:
                checkpoint.save(folder, step=5, optimizer=optimizer)
            else:
                optimizer.step()
    elif difference == "the model loaded into":
        checkpoint.save(folder, step=5, optimizer=optimizer, model=model)
        if rank == 1:
            model[1].register_buffer("more", torch.ones(1))
        with pytest.raises(checkpoint.CheckpointError, match="rank 1 of 2: not in the .*: 1.more"):
            checkpoint.load(folder, optimizer=optimizer, model=model)
        step(optimizer, range(1))
    assert difference == "the model loaded into" or not os.listdir(folder)


@pytest.mark.filterwarnings("ignore:gradients are equal")
@pytest.mark.parametrize(
    "difference", ["step", "model", "extras", "where they are", "the model loaded into"]
)
def test_ranks_that_differ(difference, tmp_path):
    run_ranks(2, differs, str(tmp_path), difference)


def test_keeps_as_many_as_asked_and_no_broken_one_counts(tmp_path):
    model, optimizer = built()
    for number in range(1, 8):
        checkpoint.save(tmp_path, step=number, optimizer=optimizer, model=model)
    (tmp_path / "step-00000006" / "rank-00000-of-00001.safetensors").write_bytes(b"torn")
    checkpoint.save(tmp_path, step=5, optimizer=optimizer, model=model, keep=2)
    assert sorted(os.listdir(tmp_path)) == [f"step-0000000{i}" for i in (4, 5, 6, 7)]
    checkpoint.save(tmp_path, step=8, optimizer=optimizer, model=model, keep=2)
    assert sorted(os.listdir(tmp_path)) == [f"step-0000000{i}" for i in (6, 7, 8)]


def test_leftovers_go_when_nobody_writes_them(tmp_path):
    root = tmp_path
    names = [f".writing-step-00000009-{i:016x}" for i in range(3)] + [".deleting-step-00000001-1"]
    for name in names:
        (root / name).mkdir()
        (root / name / "file").write_text("x")
    old = time.time() - 7200
    for name in names[1:]:
        for path in (root / name / "file", root / name):
            os.utime(path, (old, old))
    living = folders.Attempt(root, 9, f"{1:016x}", leads=True)
    living.open()
    for path in (root / names[1] / "file", root / names[1]):
        os.utime(path, (old, old))
    checkpoint.save(root, step=10)
    # The first is young, somebody holds the second.
    assert sorted(os.listdir(root)) == [*names[:2], "step-00000010"]
    living.close()
    assert sorted(os.listdir(root)) == [names[0], "step-00000010"]


def save_often(folder: str, value: float, count: int) -> None:
    for _ in range(count):
        checkpoint.save(folder, step=3, extras={"value": torch.full((5000,), value)}, keep=1)


@pytest.mark.fault("two runs save into one folder", "an error, or one of them")
def test_runs_that_save_at_once_never_mix(tmp_path):
    context = multiprocessing.get_context("fork")
    runs = [
        context.Process(target=save_often, args=(str(tmp_path), float(i), 40)) for i in range(3)
    ]
    for run in runs:
        run.start()
    looked = 0
    while any(run.is_alive() for run in runs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one that is replaced just now
            try:
                value = checkpoint.load(tmp_path).extras["value"]
            except checkpoint.CheckpointError:
                continue
        assert len(value.unique()) == 1
        looked += 1
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert looked > 5
    assert os.listdir(tmp_path) == ["step-00000003"]
    assert not checkpoint.verify(tmp_path).broken


def train_and_save_aside(rank: int, folder: str) -> None:
    model, optimizer = built()
    expected = {}
    for number in range(12):
        step(optimizer, range(number, number + 1))
        saved = checkpoint.async_save(
            f"{folder}/{number % 2}", step=number, optimizer=optimizer, model=model, keep=2
        )
        expected[number] = values(model)
    saved.wait()
    assert saved.done()
    for number in (10, 11):
        found, params = newest(f"{folder}/{number % 2}")
        assert found == number
        assert same(params, expected[number])
    # What goes wrong is said at the next call, once.
    blocked = f"{folder}/file"
    dist.barrier()
    Path(blocked).write_text("no folder")
    checkpoint.async_save(blocked, step=1, optimizer=optimizer)
    step(optimizer, range(20, 22))
    with pytest.raises(OSError, match="rank 0 of 3"):
        checkpoint.save(f"{folder}/0", step=20, optimizer=optimizer, model=model)
    assert saving._in_flight is None
    checkpoint.save(f"{folder}/0", step=20, optimizer=optimizer, model=model)
    assert newest(f"{folder}/0")[0] == 20


@pytest.mark.filterwarnings("ignore:gradients are equal")
def test_training_goes_on_while_a_thread_saves(tmp_path):
    run_ranks(3, train_and_save_aside, str(tmp_path))


def test_a_broken_optimizer_is_not_saved(tmp_path):
    _, optimizer = built()
    optimizer._broken = "a test"
    with pytest.raises(RuntimeError, match="broken off by a test"):
        checkpoint.save(tmp_path, step=1, optimizer=optimizer)
    assert not os.listdir(tmp_path)
