"""What a rank has to save, and what its objects call it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.checkpoint import plain, rng
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.manifest import DTYPES, Entry
from shardadam.checkpoint.parts import VALUES, parts_of
from shardadam.kernels.state_formats import part_of
from shardadam.optimizer import ShardedOptimizer
from shardadam.shards import shards_of


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements from ``offset`` on of a part of an entry: a 1-D tensor, live until it is copied."""

    kind: str
    name: str
    part: str
    offset: int
    tensor: Tensor


@dataclass(slots=True)
class Contents:
    """What one rank saves.

    ``entries`` and ``documents`` are every rank's, ``own_entries``, ``pieces`` and
    ``own_document`` only this one's.
    """

    entries: list[Entry] = field(default_factory=list)
    documents: dict[str, Any] = field(default_factory=dict)
    own_entries: list[Entry] = field(default_factory=list)
    own_document: dict[str, Any] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of this rank's pieces."""
        return sum(piece.tensor.nbytes for piece in self.pieces)

    def copy(self) -> None:
        """Replace the pieces by copies on the host, which training does not change."""
        self.pieces = [
            Piece(p.kind, p.name, p.part, p.offset, p.tensor.detach().to("cpu", copy=True))
            for p in self.pieces
        ]


def collect(
    rank: int,
    optimizer: ShardedOptimizer | None,
    model: nn.Module | None,
    lr_scheduler: Any,
    extras: Mapping[str, Any] | None,
    loader: Any,
    with_rng: bool,
) -> Contents:
    """All that this rank saves; copies no tensor that is dense.

    Raises:
        CheckpointError: something can't be saved; names it.
    """
    contents = Contents()
    if optimizer is not None:
        _add_optimizer(contents, optimizer, model)
    for name, tensor in others(optimizer, model).items():
        _add_whole(contents, "param", name, tensor, writes=rank == 0)
    if lr_scheduler is not None:
        state = lr_scheduler.state_dict()
        contents.documents["lr_scheduler"] = plain.encode(state, "lr_scheduler.state_dict()")
    values = {}
    for name, value in (extras or {}).items():
        if not isinstance(name, str):
            raise CheckpointError(f"extras: expected names that are strings, found {name!r}")
        if isinstance(value, Tensor):
            _add_whole(contents, "extra", name, value, writes=rank == 0)
        else:
            values[name] = plain.encode(value, f"extras[{name!r}]")
    contents.documents["extras"] = values
    contents.own_document["loader"] = plain.encode(loader, "loader")
    if with_rng:
        tensors, rest = rng.capture()
        contents.own_document["rng"] = plain.encode(rest, "rng")
        common = contents.entries
        contents.entries = contents.own_entries
        for name, tensor in tensors.items():
            _add_whole(contents, "rng", f"{rank}/{name}", tensor, writes=True)
        contents.entries = common
    _refuse_twice(contents.entries)
    # The most aligned first, as safetensors does.
    contents.pieces.sort(key=lambda piece: -piece.tensor.itemsize)
    return contents


def param_names(optimizer: ShardedOptimizer, model: nn.Module | None) -> list[list[str]]:
    """The names of every group's params: the groups' own, else the model's, else positions."""
    of_model = {} if model is None else {p: name for name, p in model.named_parameters()}
    names = []
    for index, group in enumerate(optimizer.param_groups):
        names.append(
            group.get("param_names")
            or [
                of_model.get(param, f"param {position} of group {index}")
                for position, param in enumerate(group["params"])
            ]
        )
    return names


def named_params(
    optimizer: ShardedOptimizer, model: nn.Module | None
) -> Iterator[tuple[str, Tensor]]:
    """All params of the optimizer, each once."""
    seen = set()
    for names, group in zip(param_names(optimizer, model), optimizer.param_groups, strict=True):
        for name, param in zip(names, group["params"], strict=True):
            if param not in seen:
                seen.add(param)
                yield name, param


def others(optimizer: ShardedOptimizer | None, model: nn.Module | None) -> dict[str, Tensor]:
    """What the optimizer does not update: frozen params, buffers. Tied ones by their first name."""
    placed = {} if optimizer is None else optimizer._places
    found: dict[str, Tensor] = {}
    seen: set[Tensor] = set(placed)
    if optimizer is not None:
        for name, param in named_params(optimizer, model):
            if param not in seen:
                seen.add(param)
                found[name] = param
    state = {} if model is None else model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name}: expected tensors in model.state_dict(), found {type(tensor).__name__}"
            )
        if tensor not in seen:
            seen.add(tensor)
            if name in found:
                raise CheckpointError(f"two tensors are called {name}: expected names of their own")
            found[name] = tensor
    return found


def dims_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The dims from the outermost in memory to the innermost; None if it is not dense."""
    dims = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tuple(dims) if tensor.permute(dims).is_contiguous() else None


def flat(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The elements in the order of ``dims``, complex ones as pairs: a view where it can be."""
    ordered = tensor.detach().resolve_conj().resolve_neg().permute(dims)
    return (torch.view_as_real(ordered) if ordered.is_complex() else ordered).reshape(-1)


def dtype_name(tensor: Tensor) -> str:
    """As a manifest has it."""
    return str(tensor.dtype).removeprefix("torch.")


def _add_optimizer(
    contents: Contents, optimizer: ShardedOptimizer, model: nn.Module | None
) -> None:
    names = {param: name for name, param in named_params(optimizer, model)}
    # In the order of the groups; of a param whose group was removed, nothing.
    by_param = {shard.param: shard for shard in shards_of(optimizer._places)}
    shards = [by_param[param] for param in names if param in by_param]
    scalars = {
        name: torch.stack([shard.scalars[name] for shard in shards]).tolist() if shards else []
        for name in optimizer._scalars
    }
    ranks = optimizer._communicator
    for index, shard in enumerate(shards):
        name, param = names[shard.param], shard.param
        counts = {key: float(values[index]) for key, values in scalars.items()}
        entry = Entry("param", name, tuple(param.shape), dtype_name(param), shard.dims, counts)
        contents.entries.append(entry)
        # Replicas take turns: each writes the params of its number.
        if shard.numel and index % ranks.replicas == ranks.replica:
            parts = {key: key for key in shard.tensors} | parts_of(shard.form, True)
            contents.pieces.append(Piece("param", name, VALUES, shard.offset, shard.values))
            for key, tensor in shard.tensors.items():
                first = part_of(key, shard.offset, shard.offset + shard.numel).start
                contents.pieces.append(Piece("param", name, parts[key], first, tensor))
    contents.documents["optimizer"] = type(optimizer).__name__
    contents.documents["groups"] = [
        {
            "names": list(group_names),
            "options": {
                key: plain.encode(value, f"{key!r} in group {index}")
                for key, value in group.items()
                if key not in ("params", "param_names")
            },
        }
        for index, (group_names, group) in enumerate(
            zip(param_names(optimizer, model), optimizer.param_groups, strict=True)
        )
    ]


def _add_whole(contents: Contents, kind: str, name: str, tensor: Tensor, *, writes: bool) -> None:
    dtype = dtype_name(tensor)
    if dtype not in DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{name}: expected a dense tensor of one of {', '.join(DTYPES)}, found {dtype} "
            f"({tensor.layout}) on {tensor.device}"
        )
    if hasattr(tensor, "device_mesh"):
        raise CheckpointError(
            f"{name} is a DTensor: expected torch.distributed.checkpoint, which saves it"
        )
    dims = dims_of(tensor) or tuple(range(tensor.dim()))
    contents.entries.append(Entry(kind, name, tuple(tensor.shape), dtype, dims))
    if writes and tensor.numel():
        part = VALUES if kind == "param" else kind
        contents.pieces.append(Piece(kind, name, part, 0, flat(tensor, dims)))


def _refuse_twice(entries: list[Entry]) -> None:
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        if (entry.kind, entry.name) in seen:
            raise CheckpointError(
                f"two tensors are called {entry.name}: expected names of their own"
            )
        seen.add((entry.kind, entry.name))
