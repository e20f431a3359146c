"""Checkpoints in tests/stored that other versions wrote, and how they wrote them.

Each archive there is named after the commit that wrote it:

    222dd25   the first with `shardadam.checkpoint`
    cabd4f2   the first with coded state
    0675778   as the format is now

The values that a reader has to find lie beside the checkpoints: what the optimizer and the model
had when they were saved, and after one more step. To add one at a release, or from an old commit:

    git worktree add /tmp/old COMMIT
    PYTHONPATH=/tmp/old:$(echo .venv/lib/python3*/site-packages) \
        .venv/bin/python -S tests/stored_runs.py tests/stored/COMMIT.tar.xz

(-S, so that the editable install of today's sources is not found. The compiled kernel then may not
be either, and the update runs in torch operations, with the same bits.) tests/test_stored.py reads
every archive.
"""

import inspect
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import shardadam
from ranks import run_ranks
from saved_runs import step
from shardadam import checkpoint

STORED = Path(__file__).with_name("stored")
KINDS = {
    "fp32": (torch.float32, "AdamW", {}),
    "amsgrad": (torch.float32, "Adam", {"amsgrad": True}),
    "split": (torch.bfloat16, "NAdam", {}),
    "lean": (torch.bfloat16, "AdamW", {"memory": "lean"}),
}
STEPS = 3


def built(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Ranks of two cut the weight within a row; the other params are of one rank."""
    dtype, name, options = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Linear(17, 12)
    model.scale = nn.Parameter(torch.ones(()))
    model.register_buffer("mask", torch.rand(5) > 0.5)
    model.to(dtype)
    return model, getattr(shardadam, name)(model.named_parameters(), lr=0.01, **options)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """All of both; without the optimizer's on other ranks than the first."""
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"model": values, "optim": optimizer.consolidate_state_dict()}


def write(rank: int, folder: Path, kind: str) -> None:
    """One run's checkpoint, in every format, and what comes one step later."""
    model, optimizer = built(kind)
    step(optimizer, range(STEPS))
    checkpoint.save(folder / "ours", step=STEPS, optimizer=optimizer, model=model, rng=False)
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder / "dcp")
    whole = snapshot(model, optimizer)
    step(optimizer, range(STEPS, STEPS + 1))
    after = snapshot(model, optimizer)
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
        torch.save(after, folder / "after.pt")


def main() -> None:
    options = inspect.signature(shardadam.AdamW).parameters
    kinds = [kind for kind, (_, _, given) in KINDS.items() if options.keys() >= given.keys()]
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            for world_size in (1, 2):
                target = Path(folder) / f"{kind}-{world_size}"
                target.mkdir()
                run_ranks(world_size, write, target, kind)
        with tarfile.open(sys.argv[1], "x:xz") as archive:
            for kind in sorted(Path(folder).iterdir()):
                archive.add(kind, kind.name, filter=_of_nobody)
    print(f"{sys.argv[1]}: {', '.join(kinds)}, by {Path(shardadam.__file__).parent}")


def _of_nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
