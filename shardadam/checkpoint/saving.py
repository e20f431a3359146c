"""Saving: every rank writes its file, then one of them makes the checkpoint whole."""

import json
import os
import secrets
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardadam.agreement import Point, digest, first_difference
from shardadam.checkpoint import folders, manifest, tensorfile
from shardadam.checkpoint.contents import Contents, collect
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.manifest import Entry, Manifest, Shard
from shardadam.checkpoint.progress import Bar
from shardadam.checkpoint.together import together
from shardadam.checkpoint.verifying import is_complete
from shardadam.collectives import Communicator
from shardadam.optimizer import ShardedOptimizer

_ARGUMENTS = """

    Collective. Each rank writes the elements that it owns; what the optimizer does not update
    (frozen params, buffers) and ``extras`` are rank 0's. A checkpoint appears whole or not at all:
    all is written and synced to disk under another name, which is then changed.

    Args:
        directory: where the checkpoints are, one folder each. On one file system for all ranks.
        step: the number of this one; a checkpoint of the same step is replaced.
        optimizer: one of shardadam's.
        model: its params are named by it, and those that are not in the optimizer saved too, as
            are its buffers.
        lr_scheduler: its ``state_dict()`` has to be of plain values.
        extras: tensors and plain values (None, bool, int, float, str, lists, tuples, dicts).
        loader: the data loader's position, a plain value; each rank has its own.
        rng: whether to save the states of the random number generators, for each rank.
        keep: how many checkpoints to keep: after success, those of earlier steps are deleted until
            this many are left. Broken ones don't count and stay.
        process_group: the ranks, where there is no optimizer; with one, they are its ranks.
"""
_RAISES = """
    Raises:
        CheckpointError: something that can't be saved, by name.
        OSError: a rank could not write.
        RuntimeError: the optimizer's step was broken off; a rank died, or came elsewhere. This and
            the others on every rank, with the last checkpoint as it was.
"""


@dataclass(slots=True)
class _Job:
    """A save that all ranks have agreed on."""

    communicator: Communicator
    root: Path
    step: int
    keep: int | None
    attempt: str
    contents: Contents


class Pending:
    """A checkpoint that a thread is writing."""

    def __init__(self, job: _Job) -> None:
        self._path: Path | None = None
        self._error: BaseException | None = None
        # Not a daemon: a program that ends waits for its last checkpoint.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint")
        self._thread.start()

    def _run(self, job: _Job) -> None:
        try:
            self._path = _write(job)
        except BaseException as error:
            self._error = error

    def done(self) -> bool:
        """Whether it is written, or has failed."""
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until it is written, and return its folder.

        Raises:
            OSError, CheckpointError, RuntimeError: as `save`, once; on every rank.
        """
        global _in_flight
        self._thread.join()
        if _in_flight is self:
            _in_flight = None
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path


_in_flight: Pending | None = None


def finish() -> None:
    """Wait for what `async_save` began, and raise what went wrong with it."""
    if _in_flight is not None:
        _in_flight.wait()


def save(
    directory: str | Path,
    *,
    step: int,
    optimizer: ShardedOptimizer | None = None,
    model: nn.Module | None = None,
    lr_scheduler: Any = None,
    extras: Mapping[str, Any] | None = None,
    loader: Any = None,
    rng: bool = True,
    keep: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint and return its folder."""
    finish()
    communicator = communicator_of(optimizer, process_group)
    collected = (optimizer, model, lr_scheduler, extras, loader, rng)
    return _write(_begin(communicator, Path(directory), step, keep, collected, copies=False))


def async_save(
    directory: str | Path,
    *,
    step: int,
    optimizer: ShardedOptimizer | None = None,
    model: nn.Module | None = None,
    lr_scheduler: Any = None,
    extras: Mapping[str, Any] | None = None,
    loader: Any = None,
    rng: bool = True,
    keep: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Pending:
    """Copy what is to be saved, and let a thread write it while training goes on.

    The copy is on the host and as large as what this rank writes. One save is under way at most:
    this waits for the last one, and raises what went wrong with it, as do `save` and `load`.
    """
    finish()
    global _in_flight
    communicator = communicator_of(optimizer, process_group)
    collected = (optimizer, model, lr_scheduler, extras, loader, rng)
    job = _begin(communicator, Path(directory), step, keep, collected, copies=True)
    # The thread's exchanges are in a process group of their own: they never meet training's.
    job.communicator = communicator.aside()
    _in_flight = Pending(job)
    return _in_flight


save.__doc__ = f"{save.__doc__}{_ARGUMENTS}{_RAISES}"
async_save.__doc__ = f"{async_save.__doc__}{_ARGUMENTS}{_RAISES}"


def write_contents(root: Path, step: int, contents: Contents) -> Path:
    """Write what did not come from an optimizer, on this process alone, and return its folder.

    Raises:
        CheckpointError: two tensors have one name, or it is too much for a manifest.
        OSError: it could not be written.
    """
    alone = Communicator(None, torch.device("cpu"))
    return _write(_Job(alone, root, step, None, secrets.token_hex(8), contents))


def communicator_of(
    optimizer: ShardedOptimizer | None, process_group: torch.distributed.ProcessGroup | None
) -> Communicator:
    """The ranks that save or load together."""
    if optimizer is None:
        return Communicator(process_group, torch.device("cpu"))
    if not isinstance(optimizer, ShardedOptimizer):
        raise CheckpointError(
            f"expected an optimizer of shardadam's, found {type(optimizer).__name__}"
        )
    communicator = optimizer._communicator
    if process_group not in (None, communicator.process_group):
        raise CheckpointError("process_group: expected the optimizer's own, or None")
    return communicator


def _begin(
    communicator: Communicator,
    root: Path,
    step: int,
    keep: int | None,
    collected: tuple[Any, ...],
    *,
    copies: bool,
) -> _Job:
    """Collect what is to be saved, and agree with the other ranks that all can."""
    contents, error = Contents(), None
    try:
        if type(step) is not int or not 0 <= step < 10**18:
            raise CheckpointError(f"step: expected an int from 0, found {step!r}")
        if keep is not None and (type(keep) is not int or keep < 1):
            raise CheckpointError(f"keep: expected an int from 1 or None, found {keep!r}")
        if collected[0] is not None:
            check_optimizer(collected[0])
            collected[0]._verify_state()
            collected[0]._take_edits()
        contents = collect(communicator.rank, *collected)
        if copies:
            contents.copy()
    except Exception as caught:
        error = caught
    lines = [f"step {step}, keep {keep}", *map(_line, contents.entries)]
    words = {
        # One rank's choice is everybody's.
        "attempt": secrets.randbits(62) if communicator.rank == 0 else 0,
        "lines": digest("\n".join(lines)),
    }
    seen = together(communicator, Point.SAVE, error, words)
    if not seen["lines"].agreed:
        texts = communicator.gather_bytes(json.dumps(lines).encode())
        difference = first_difference([json.loads(text) for text in texts])
        raise CheckpointError(f"expected to save the same on every rank: {difference}")
    return _Job(communicator, root, step, keep, f"{seen['attempt'].high:016x}", contents)


def check_optimizer(optimizer: ShardedOptimizer) -> None:
    """Wait for its params; raise if they are no longer its own, or a step was broken off."""
    optimizer.synchronize()
    if optimizer._broken is not None:
        raise RuntimeError(f"an earlier step() was broken off by {optimizer._broken}")
    for bucket in optimizer._buckets:
        bucket.refresh()
        if not bucket.exchanged:
            raise CheckpointError(
                f"{bucket.names[0]} is a DTensor: expected torch.distributed.checkpoint, which "
                "saves and loads it at any mesh"
            )


def _line(entry: Entry) -> str:
    return f"{entry.name} {entry.shape} {entry.dtype}, dims {entry.dims}, {entry.scalars}"


def _write(job: _Job) -> Path:
    """Write all files, agree that they are written, make them the checkpoint. Collective."""
    communicator, contents = job.communicator, job.contents
    attempt = folders.Attempt(job.root, job.step, job.attempt, leads=communicator.rank == 0)
    try:
        error, section = None, b""
        try:
            attempt.open()
            section = _write_file(job, attempt.folder)
        except Exception as caught:
            error = caught
        together(communicator, Point.SAVE, error)
        sections = communicator.gather_bytes(section)
        path = job.root / f"step-{job.step:08d}"
        if communicator.rank == 0:
            try:
                whole = _merge(job, [json.loads(text) for text in sections])
                _check_sizes(attempt.folder, whole)
                text = manifest.write(whole)
                tensorfile.write_file(attempt.folder, manifest.FILE, text)
                attempt.publish()
                _tidy(job)
            except Exception as caught:
                error = caught
        together(communicator, Point.SAVE, error)
    finally:
        contents.pieces.clear()
        attempt.close()
    return path


def _write_file(job: _Job, folder: int) -> bytes:
    """Write this rank's file; what the manifest has to say of it."""
    contents, rank = job.contents, job.communicator.rank
    entries = [*contents.entries, *contents.own_entries]
    numbers = {(entry.kind, entry.name): i for i, entry in enumerate(entries)}
    shards = [
        Shard(numbers[piece.kind, piece.name], piece.part, piece.offset, piece.tensor.numel())
        for piece in contents.pieces
    ]
    world_size = job.communicator.world_size
    header, _ = manifest.file_layout(job.attempt, rank, world_size, entries, shards)
    name = manifest.file_name(rank, world_size)
    with Bar(f"saving step {job.step}", contents.nbytes, rank) as bar:
        tensors = (piece.tensor for piece in contents.pieces)
        digests = tensorfile.write(folder, name, header, tensors, bar)
    return json.dumps(
        {
            "entries": [
                [e.kind, e.name, list(e.shape), e.dtype, list(e.dims)] for e in contents.own_entries
            ],
            "shards": [
                [shard.entry, shard.part, shard.offset, shard.numel, text]
                for shard, text in zip(shards, digests, strict=True)
            ],
            "document": contents.own_document,
        }
    ).encode()


def _merge(job: _Job, sections: list[dict[str, Any]]) -> Manifest:
    """One manifest of what all ranks wrote."""
    entries = list(job.contents.entries)
    common = len(entries)
    files = []
    for section in sections:
        moved = len(entries) - common  # this rank counted its own entries from ``common``
        for kind, name, shape, dtype, dims in section["entries"]:
            entries.append(Entry(kind, name, tuple(shape), dtype, tuple(dims)))
        files.append(
            [Shard(i + moved if i >= common else i, *rest) for i, *rest in section["shards"]]
        )
    documents = {**job.contents.documents, "ranks": [s["document"] for s in sections]}
    return Manifest(job.attempt, job.step, entries, files, documents)


def _check_sizes(folder: int, whole: Manifest) -> None:
    """See that all ranks' files are here: they are not if a rank has another file system."""
    for rank in range(len(whole.files)):
        name = manifest.file_name(rank, len(whole.files))
        file, size = tensorfile.open_file(folder, name, f"{name} of rank {rank}, seen by rank 0")
        os.close(file)
        expected = whole.layout(rank)[1][-1]
        if size != expected:
            raise CheckpointError(f"{name}: expected {expected} bytes, found {size}")


def _tidy(job: _Job) -> None:
    """Delete old checkpoints and leftovers; the new one is good whatever happens here."""
    try:
        if job.keep is not None:
            older = [c for c in folders.candidates(job.root) if c.step < job.step]
            whole = [candidate for candidate in older if is_complete(candidate.path)]
            for candidate in whole[job.keep - 1 :]:
                folders.remove(candidate.path)
        folders.remove_leftovers(job.root)
    except OSError as error:
        warnings.warn(f"old checkpoints could not be deleted: {error}", stacklevel=4)
