"""Folders of torch.distributed.checkpoint as `RunState`, and back.

Its own reader unpickles `.metadata`, and plain values with ``weights_only=False``: that runs
whatever code the files name. So the metadata is unpickled here with nothing but its own classes
allowed, and the slices of files that it names are read by ``torch.load(weights_only=True)``.
"""

import io
import math
import os
import pickle
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli.plain_load import load_plain
from shardadam.cli.run_state import RunState, groups_by, optimizer_of

if TYPE_CHECKING:  # half a second that only those pay who have such a checkpoint
    from torch.distributed.checkpoint.metadata import Metadata

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "TensorStorageMetadata")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "Path")),
    ("collections", "OrderedDict"),
}


class _Unpickler(pickle._Unpickler):
    """The one in Python: what is no pickle is always an exception there, in C not quite."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(f"{module}.{name}, which no metadata of DCP has")


class Folder:
    """A checkpoint of DCP: its metadata, and its values when they are asked for.

    Attributes:
        paths: what the flat keys stand for, as keys of nested dicts and lists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = _metadata(path / ".metadata")
        try:
            self._index(f"{path}/.metadata")
        except CheckpointError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}/.metadata: expected DCP's metadata: {error}") from error

    def _index(self, where: str) -> None:
        paths = self.metadata.planner_data
        keys = set(self.metadata.state_dict_metadata)
        if not isinstance(paths, dict) or not keys <= set(paths):
            raise CheckpointError(f"{where}: expected the keys of nested dicts in planner_data")
        self.paths: dict[str, tuple[Any, ...]] = {key: tuple(paths[key]) for key in sorted(keys)}
        self._stored: dict[str, list[tuple[Any, Any]]] = {}
        for index, info in self.metadata.storage_data.items():
            name = info.relative_path
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
                raise CheckpointError(f"{where}: expected the name of a file, found {name!r}")
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{where}: expected data as it is, found it compressed")
            if not all(type(n) is int and n >= 0 for n in (info.offset, info.length)):
                raise CheckpointError(f"{where}: expected a part of {name}")
            self._stored.setdefault(index.fqn, []).append((index, info))
        for key in filter(self.is_tensor, keys):
            shape, dtype = self.like(key)
            if not (
                isinstance(dtype, torch.dtype) and all(type(n) is int and n >= 0 for n in shape)
            ):
                raise CheckpointError(f"{where}: {key}: expected a shape and a dtype")

    def is_tensor(self, key: str) -> bool:
        """Whether it is a tensor, and no plain value."""
        return hasattr(self.metadata.state_dict_metadata[key], "properties")

    def like(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """A tensor's shape and dtype."""
        described: Any = self.metadata.state_dict_metadata[key]
        return tuple(described.size), described.properties.dtype

    def files(self) -> dict[str, int]:
        """Bytes that the files have at least, by name."""
        ends: dict[str, int] = {}
        for _, info in (item for items in self._stored.values() for item in items):
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
        return dict(sorted(ends.items()))

    def value(self, key: str) -> Any:
        """Read a tensor or a plain value.

        Raises:
            CheckpointError: it is not there, not whole, or no such value.
        """
        stored = self._stored.get(key, [])
        if not self.is_tensor(key):
            if len(stored) != 1:
                raise CheckpointError(f"{self.path}: {key}: expected its value, found none")
            return self._load(key, stored[0][1])
        try:
            return self._tensor(key, stored)
        except CheckpointError:
            raise
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: {key}: bad metadata: {error}"[:300]) from error

    def _tensor(self, key: str, stored: list[tuple[Any, Any]]) -> Tensor:
        shape, dtype = self.like(key)
        described: Any = self.metadata.state_dict_metadata[key]
        parts = {tuple(index.offset or (0,) * len(shape)): info for index, info in stored}
        whole = torch.empty(shape, dtype=dtype)
        filled = 0
        for chunk in described.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if offsets not in parts:
                raise CheckpointError(f"{self.path}: {key}: the part at {offsets} is not there")
            part = self._load(key, parts[offsets])
            if not isinstance(part, Tensor) or tuple(part.shape) != sizes or part.dtype != dtype:
                raise CheckpointError(f"{self.path}: {key}: expected {sizes} {dtype} at {offsets}")
            box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            target = whole[box]
            if target.shape != part.shape:
                raise CheckpointError(f"{self.path}: {key}: {offsets} + {sizes} is not in {shape}")
            target.copy_(part)
            filled += part.numel()
        if filled != math.prod(shape):
            raise CheckpointError(
                f"{self.path}: {key}: expected {math.prod(shape)} elements, found {filled}"
            )
        return whole

    def _load(self, key: str, info: Any) -> Any:
        where = f"{self.path}/{info.relative_path}"
        with open(where, "rb", opener=_regular) as file:
            if os.fstat(file.fileno()).st_size < info.offset + info.length:
                raise CheckpointError(f"{where}: {key}: expected bytes, found the file's end")
            file.seek(info.offset)
            data = io.BytesIO(file.read(info.length))
        return load_plain(data, f"{where}: {key}")


def read(path: Path) -> RunState:
    """Read a folder of ``{"model": …, "optim": …}``.

    Raises:
        CheckpointError: it can't be read, or holds something else.
    """
    folder = Folder(path)
    found, saved_groups = RunState({}), {}
    for key, keys in folder.paths.items():
        match keys:
            case ("model", *names) if names and folder.is_tensor(key):
                found.model[".".join(map(str, names))] = folder.value(key)
            case ("optim", "state", name, part):
                found.state.setdefault(str(name), {})[str(part)] = folder.value(key)
            case ("optim", "param_groups"):
                value = folder.value(key)
                saved_groups = dict(enumerate(value if isinstance(value, list) else [value]))
            case ("optim", "param_groups", int(number), str(option)):
                saved_groups.setdefault(number, {})[option] = folder.value(key)
            case _:
                found.left_out.append(key)
    if not found.model:
        raise CheckpointError(f'{path}: expected {{"model": …, "optim": …}}, found no "model"')
    groups = [saved_groups[number] for number in sorted(saved_groups)]
    found.groups = groups_by(groups, str(path), None)
    found.optimizer = optimizer_of(found.groups, found.state)
    found.leave_out_strays()
    return found


def write(path: Path, found: RunState) -> None:
    """Write a new folder, on this process alone."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    groups = [
        {**group.options, "param_names": group.names, "params": group.names}
        for group in found.groups
    ]
    state = {"model": found.model, "optim": {"state": found.state, "param_groups": groups}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(state, checkpoint_id=path, no_dist=True)
        except CheckpointException as error:  # whose text is a traceback
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, RuntimeError):  # torch's writer, of a full disk
                raise OSError(f"{path}: writing failed: {cause}") from error
            raise cause from error


def _regular(name: str, flags: int) -> int:
    """Open a file that is one: no link, no device."""
    file = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise CheckpointError(f"{name}: expected a regular file")
    return file


def _metadata(path: Path) -> "Metadata":
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with open(path, "rb", opener=_regular) as file:
            found = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused: {error}") from error
    except OSError:
        raise
    except Exception as error:  # whatever the bytes provoke
        text = (
            f"{path}: expected DCP's metadata, found what is none: {type(error).__name__} {error}"
        )
        raise CheckpointError(text[:300]) from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{path}: expected DCP's metadata, found {type(found).__name__}")
    for name in ("state_dict_metadata", "storage_data"):
        if not isinstance(getattr(found, name, None), dict):
            raise CheckpointError(f"{path}: expected DCP's metadata, found it without {name}")
    return found
