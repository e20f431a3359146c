"""Which kind of checkpoint a path is, by its files' names, and what is in them."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from shardadam.checkpoint import folders, manifest
from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli.apex import is_apex


class Format(Enum):
    """Of a checkpoint: the values are what users call them."""

    OURS = "ours"
    DCP = "dcp"
    TORCH = "torch"
    DEEPSPEED = "deepspeed"
    APEX = "apex"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint: its format, and where it is."""

    format: Format
    path: Path


def recognise(path: Path) -> Found:
    """What is at ``path``; of a directory of several checkpoints, the newest.

    Raises:
        CheckpointError: nothing that is known here.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: expected a checkpoint, found nothing")
    if not path.is_dir():
        return Found(Format.APEX if is_apex(path) else Format.TORCH, path)
    found = all_of_ours(path)
    if found:
        return Found(Format.OURS, found[0])
    if (path / ".metadata").exists():
        return Found(Format.DCP, path)
    if (path / "latest").is_file():
        return Found(Format.DEEPSPEED, _latest(path))
    if any(path.glob("*_states.pt")):
        return Found(Format.DEEPSPEED, path)
    if is_apex(path):
        return Found(Format.APEX, path)
    raise CheckpointError(
        f"{path}: expected a checkpoint, found a folder without {manifest.FILE}, .metadata, "
        "folders step-…, DeepSpeed's latest or apex's shards"
    )


def _latest(path: Path) -> Path:
    """The folder of the tag that DeepSpeed saved last."""
    with open(path / "latest", "rb") as file:
        tag = file.read(256).decode(errors="replace").strip()
    if tag in ("", ".", "..") or not tag.isprintable() or "/" in tag:
        raise CheckpointError(f"{path}/latest: expected the name of a folder, found {tag!r}")
    if not (path / tag).is_dir():
        raise CheckpointError(f"{path}/latest: expected the folder {tag}, found none")
    return path / tag


def all_of_ours(path: Path) -> list[Path]:
    """The folder itself, if it is one of ours, whole or not; else those in it, the newest first."""
    # A link to a checkpoint is as good as its name; links inside of one are refused.
    folder = path.resolve() if path.is_symlink() else path
    is_one = (
        (folder / manifest.FILE).exists()
        or any(folder.glob("rank-*-of-*.safetensors"))
        or (folder.is_dir() and folders.step_of(folder.name) is not None)
    )
    if is_one:
        return [folder]
    return [found.path for found in folders.candidates(folder)] if folder.is_dir() else []
