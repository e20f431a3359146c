"""Checkpoints: one folder each, that either is there whole or is not there at all.

DIR/step-000300/model.pt             written by rank 0: the model, the history, the settings
DIR/step-000300/optimizer-rank0.pt   written by every rank: its shard of the optimizer's state
DIR/step-000300/optimizer-rank1.pt
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PREFIX = "step-"


def save(directory: Path, step: int, shared: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Write the checkpoint of ``step``, then remove those before it. Every rank calls it."""
    rank = _rank()
    written = directory / f".{_PREFIX}{step:06}.unfinished"
    if rank == 0:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir(parents=True)
        torch.save(shared, written / "model.pt")
    _barrier()
    torch.save(optimizer, written / f"optimizer-rank{rank}.pt")
    _barrier()
    if rank == 0:
        final = directory / f"{_PREFIX}{step:06}"
        if not final.exists():
            written.rename(final)
        for other in directory.iterdir():
            if other != final:
                shutil.rmtree(other)
    _barrier()


def clear(directory: Path) -> None:
    """Forget an earlier training. Every rank calls it."""
    if _rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    _barrier()


def load_latest(directory: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What `save` was given last, on this rank; None where there is no checkpoint."""
    found = sorted(directory.glob(f"{_PREFIX}*"))
    if not found:
        return None
    shared = torch.load(found[-1] / "model.pt", weights_only=True)
    return shared, torch.load(found[-1] / f"optimizer-rank{_rank()}.pt", weights_only=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
