"""Loading: the newest checkpoint that is whole, into whatever world there is now."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardadam.agreement import Point, digest
from shardadam.checkpoint import folders
from shardadam.checkpoint.errors import CheckpointError, NoCheckpoint, OtherVersion
from shardadam.checkpoint.filling import write_shard
from shardadam.checkpoint.fitting import Fit, Fitter
from shardadam.checkpoint.progress import Bar
from shardadam.checkpoint.reading import Reader
from shardadam.checkpoint.saving import check_optimizer, communicator_of, finish
from shardadam.checkpoint.together import together
from shardadam.checkpoint.verifying import Opened
from shardadam.collectives import Communicator
from shardadam.optimizer import ShardedOptimizer
from shardadam.shards import shards_of


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` found.

    ``loader`` is this rank's position where the world is as large as it was, or what all ranks
    had in common, else None; ``loaders`` has that of every rank that saved. ``skipped``: newer
    checkpoints that are not whole, with the reason.
    """

    path: Path
    step: int
    extras: dict[str, Any]
    loader: Any
    loaders: list[Any]
    skipped: list[tuple[Path, str]]


def load(
    directory: str | Path,
    *,
    optimizer: ShardedOptimizer | None = None,
    model: nn.Module | None = None,
    lr_scheduler: Any = None,
    rng: bool = True,
    strict: bool = True,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Loaded:
    """Load the newest checkpoint that is whole. Collective.

    At any world size, whatever the buckets, strides and master weights: what can be exact is. All
    of it is verified, and compared with the objects, before anything is changed. A checkpoint that
    is not whole is skipped, with a warning; one that does not fit, or that another version of the
    format wrote, is an error.

    Args:
        directory: what `save` was given.
        optimizer: one of shardadam's; gets params, state and hyperparameters.
        model: gets what the optimizer has not; without an optimizer, all.
        lr_scheduler: as it was saved.
        rng: whether to restore the random number generators, of ranks that there were.
        strict: whether params, groups or a scheduler that were not saved, or are not here, are an
            error; otherwise a warning.
        process_group: as in `save`.

    Raises:
        CheckpointError: no checkpoint is whole, or the newest does not fit or is of another version
            of the format; nothing has changed. `NoCheckpoint` where there is none at all.
        RuntimeError: a rank failed; if reading broke off, the optimizer says so from now on. This
            and the others on every rank.
    """
    finish()
    communicator = communicator_of(optimizer, process_group)
    root = Path(directory)
    paths = _candidates(communicator, root, optimizer)
    if not paths:
        raise NoCheckpoint(f"{root}: expected a folder step-… with a whole checkpoint, found none")
    skipped: list[tuple[Path, str]] = []
    for path in paths:
        opened: Opened | None = None
        try:
            try:
                opened = _open(communicator, path)
            except OtherVersion:
                raise
            except CheckpointError as error:
                skipped.append((path, str(error)))
                text = f"{path} is not whole, skipped: {error}"
                _warn(communicator, [text] if communicator.rank == 0 else [])
                continue
            loaded, notes = _load(
                communicator, opened, (optimizer, model, lr_scheduler), rng, strict, skipped
            )
        finally:
            if opened is not None:
                opened.close()
        _warn(communicator, [f"{path}: {note}" for note in notes])
        return loaded
    reasons = "".join(f"\n  {path.name}: {reason}" for path, reason in skipped)
    raise CheckpointError(
        f"{root}: expected a folder step-… with a whole checkpoint, found {len(skipped)} that are "
        f"broken:{reasons}"
    )


def latest(directory: str | Path) -> Path | None:
    """The newest checkpoint that is whole, every byte verified; None if there is none. Local.

    Raises:
        CheckpointError: of what may be the newest, the format is of another version.
    """
    for candidate in folders.candidates(Path(directory)):
        try:
            with Opened(candidate.path) as opened:
                opened.check(range(len(opened.manifest.files)), 0)
            return candidate.path
        except OtherVersion:
            raise
        except CheckpointError:
            continue
    return None


def _warn(communicator: Communicator, texts: Sequence[str]) -> None:
    """Warn on this rank; where warnings are errors, one on all ranks. Collective."""
    error: Exception | None = None
    try:
        for text in texts:
            warnings.warn(text, stacklevel=3)
    except Warning as raised:
        error = raised
    together(communicator, Point.LOAD, error)


def _candidates(
    communicator: Communicator, root: Path, optimizer: ShardedOptimizer | None
) -> list[Path]:
    """As the first rank sees them: ranks may look while somebody saves."""
    error, names = None, b"[]"
    try:
        if optimizer is not None:
            check_optimizer(optimizer)
        if communicator.rank == 0:
            names = json.dumps([c.path.name for c in folders.candidates(root)]).encode()
    except Exception as caught:
        error = caught
    together(communicator, Point.LOAD, error)
    return [root / name for name in json.loads(communicator.gather_bytes(names)[0])]


def _open(communicator: Communicator, path: Path) -> Opened:
    """Open a checkpoint that all ranks together have verified, each its part of the files."""
    opened, error = None, None
    try:
        opened = Opened(path)
        mine = range(communicator.rank, len(opened.manifest.files), communicator.world_size)
        opened.check(mine, communicator.rank)
    except Exception as caught:
        error = caught
    attempt = 0 if opened is None else digest(opened.manifest.attempt)
    try:
        seen = together(communicator, Point.LOAD, error, {"attempt": attempt})
        if not seen["attempt"].agreed:
            raise CheckpointError("another checkpoint took its place while it was read")
    except BaseException:
        if opened is not None:
            opened.close()
        raise
    assert opened is not None
    return opened


def _load(
    communicator: Communicator,
    opened: Opened,
    objects: tuple[ShardedOptimizer | None, nn.Module | None, Any],
    rng: bool,
    strict: bool,
    skipped: list[tuple[Path, str]],
) -> tuple[Loaded, list[str]]:
    """Compare, agree, write."""
    optimizer, model, lr_scheduler = objects
    rank, world_size = communicator.rank, communicator.world_size
    documents = opened.manifest.documents
    error, fit, loaded = None, Fit(), None
    try:
        reader = Reader(opened)
        fitter = Fitter(reader, documents, rank, world_size, strict)
        fitter.tensors(optimizer, model)
        if lr_scheduler is not None:
            fitter.lr_scheduler(lr_scheduler)
        if rng:
            fitter.rng()
        loaders = fitter.loaders()
        same = all(loader == loaders[0] for loader in loaders)
        loader = loaders[rank] if len(loaders) == world_size else loaders[0] if same else None
        step = opened.manifest.step
        loaded = Loaded(opened.path, step, fitter.extras(), loader, loaders, skipped)
        fit = fitter.fit
    except Exception as caught:
        error = caught
    together(communicator, Point.LOAD, error)
    assert loaded is not None
    _try(communicator, fit)
    if optimizer is None:
        _apply(communicator, reader, fit, None)
    else:
        with optimizer._broken_by_errors():
            _apply(communicator, reader, fit, optimizer)
    return loaded, fit.notes


def _try(communicator: Communicator, fit: Fit) -> None:
    """What may refuse, undone on every rank if it does on one."""
    error: Exception | None = None
    try:
        for write, _ in fit.tries:
            write()
    except Exception as caught:
        error = CheckpointError(
            f"lr_scheduler.load_state_dict(): {type(caught).__name__}: {caught}"
        )
        error.__cause__ = caught
    try:
        together(communicator, Point.LOAD, error)
    except BaseException:
        for _, undo in fit.tries:
            undo()
        raise


@torch.no_grad()
def _apply(
    communicator: Communicator, reader: Reader, fit: Fit, optimizer: ShardedOptimizer | None
) -> None:
    error: Exception | None = None
    try:
        if optimizer is not None:
            _fill(communicator, reader, fit, optimizer)
        for write in fit.writes:
            write()
    except Exception as caught:
        error = caught
    together(communicator, Point.LOAD, error)
    if optimizer is not None:
        communicator.all_gather([bucket.memory.flat for bucket in optimizer._buckets])
        torch.autograd.graph.increment_version(list(optimizer._places))
        optimizer._show(optimizer.state)
        optimizer._forget_grads()


def _fill(
    communicator: Communicator, reader: Reader, fit: Fit, optimizer: ShardedOptimizer
) -> None:
    """Fill what this rank owns."""
    places = optimizer._places
    for (bucket, _), index in zip(places.values(), fit.shards, strict=True):
        if index is not None and reader.has_maximum(index):
            bucket.add_maximum()
    shards = shards_of(places)
    total = sum(shard.numel for shard in shards)
    with Bar("loading", total, communicator.rank) as bar:
        for shard, index in zip(shards, fit.shards, strict=True):
            if index is not None:
                write_shard(reader, index, shard)
                bar(shard.numel)
