"""Our checkpoints as `RunState`, and back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint import plain
from shardadam.checkpoint.contents import Contents, Piece, dims_of, dtype_name, flat
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.manifest import DTYPES, Entry
from shardadam.checkpoint.parts import MAXIMA, VALUES, may_have
from shardadam.checkpoint.reading import Reader
from shardadam.checkpoint.saving import write_contents
from shardadam.checkpoint.verifying import Opened
from shardadam.cli.run_state import SCALARS, Group, RunState, as_scalar, number_of
from shardadam.kernels.state_formats import MASTERS, MOMENTS


def read(path: Path) -> RunState:
    """Read a checkpoint, verified before.

    Raises:
        CheckpointError: it is damaged.
    """
    with Opened(path) as opened:
        opened.check(range(len(opened.manifest.files)), 0)
        reader, documents = Reader(opened), opened.manifest.documents
        found = RunState({}, groups=_groups(documents, str(path)))
        if isinstance(documents.get("optimizer"), str):
            found.optimizer = documents["optimizer"]
        # An empty param has no shards: it has what others of its dtype have.
        shards = [shard for file in opened.manifest.files for shard in file]
        used = {(reader.entries[shard.entry].dtype, shard.part) for shard in shards}
        formats: set[str] = set()
        for number, entry in enumerate(reader.entries):
            if entry.kind != "param":
                continue
            found.model[entry.name] = _tensor(reader, number, VALUES)
            if entry.scalars is not None:
                state: dict[str, Any] = {k: as_scalar(k, v) for k, v in entry.scalars.items()}
                moments = _moments(reader, number, used)
                masters = {
                    part: _tensor(reader, number, part)
                    for part in MASTERS
                    if reader.has(number, part) and (entry.dtype, part) in used
                }
                state |= {**moments, **masters}
                if reader.form(number).dtypes is not None:
                    formats.add(reader.form(number).name)
                found.state[entry.name] = state
        found.left_out = _besides(reader.entries, documents)
        found.notes += [f"moments are decoded, they are {name} there" for name in sorted(formats)]
    missing = [n for group in found.groups for n in group.names if n not in found.model]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]!r} is in a group, and is not saved")
    return found


def write(root: Path, step: int, found: RunState) -> Path:
    """Write ``found`` as the checkpoint of ``step`` in ``root`` and return its folder.

    Raises:
        CheckpointError: it has what no checkpoint of ours can hold.
    """
    contents = Contents()
    in_groups = dict.fromkeys(name for group in found.groups for name in group.names)
    missing = [name for name in in_groups if name not in found.model]
    if missing:
        raise CheckpointError(f"{missing[0]!r} is in a param group, and not in the model")
    # Of a tied param there is one tensor here, under its first name.
    others = [name for name in found.model if name not in in_groups and name not in found.tied]
    for name in [*in_groups, *others]:
        _add(contents, found, name, found.model[name], found.state.get(name))
    contents.pieces.sort(key=lambda piece: -piece.tensor.itemsize)
    contents.documents["extras"] = {}
    if found.groups:
        contents.documents["optimizer"] = found.optimizer
        contents.documents["groups"] = [
            {
                "names": group.names,
                "options": {
                    key: plain.encode(value, f"{key!r} in group {number}")
                    for key, value in group.options.items()
                },
            }
            for number, group in enumerate(found.groups)
        ]
    contents.own_document["loader"] = None
    return write_contents(root, step, contents)


def _groups(documents: dict[str, Any], where: str) -> list[Group]:
    groups = []
    saved = documents.get("groups", [])
    for number, group in enumerate(saved if isinstance(saved, list) else []):
        names = group.get("names") if isinstance(group, dict) else None
        options = group.get("options") if isinstance(group, dict) else None
        if not isinstance(names, list) or not isinstance(options, dict):
            raise CheckpointError(f"{where}: group {number}: expected names and options")
        decoded = {k: plain.decode(v, f"{k!r} of group {number}") for k, v in options.items()}
        groups.append(Group([str(name) for name in names], decoded))
    return groups


def _tensor(reader: Reader, number: int, part: str) -> Tensor:
    """A whole part, with the strides that it was saved with."""
    entry = reader.entries[number]
    values = reader.range(number, part, 0, entry.numel, entry.dims)
    return _shaped(entry, values.bool() if entry.dtype == "bool" and part == VALUES else values)


def _moments(reader: Reader, number: int, used: set[tuple[str, str]]) -> dict[str, Tensor]:
    """Whole moments, decoded."""
    entry = reader.entries[number]
    moments = reader.moments(number, 0, entry.numel, entry.dims)
    if not entry.numel and any((entry.dtype, part) in used for part in MAXIMA):
        moments["max_exp_avg_sq"] = moments["exp_avg_sq"]
    return {name: _shaped(entry, values) for name, values in moments.items()}


def _shaped(entry: Entry, values: Tensor) -> Tensor:
    if entry.dtype.startswith("complex"):
        values = torch.view_as_complex(values.view(-1, 2))
    ordered = values.view([entry.shape[dim] for dim in entry.dims])
    return ordered.permute([entry.dims.index(dim) for dim in range(len(entry.shape))])


def _besides(entries: list[Entry], documents: dict[str, Any]) -> list[str]:
    """What a state dict of model and optimizer has no place for."""
    found = [name for name in ("lr_scheduler",) if name in documents]
    extras = documents.get("extras")
    names = [*(extras if isinstance(extras, dict) else [])]
    names += [entry.name for entry in entries if entry.kind == "extra"]
    found += [f"extras[{name!r}]" for name in names]
    ranks = documents.get("ranks")
    for what in ("loader", "rng"):
        if any(isinstance(r, dict) and r.get(what) is not None for r in ranks or []):
            found.append({"rng": "the random generators' states", "loader": "loader"}[what])
    return found


def _add(
    contents: Contents, found: RunState, name: str, tensor: Tensor, state: dict[str, Any] | None
) -> None:
    dtype = dtype_name(tensor)
    if dtype not in DTYPES or tensor.layout is not torch.strided:
        raise CheckpointError(f"{name}: expected a dense tensor, found {dtype} ({tensor.layout})")
    dims = dims_of(tensor) or tuple(range(tensor.dim()))
    scalars = None
    if state is not None:
        scalars = {
            key: number_of(state[key], f"{key} of {name}")
            for key in dict.fromkeys([*SCALARS[:1], *(key for key in SCALARS if key in state)])
            if key in state or _missing(name, key)
        }
    entry = Entry("param", name, tuple(tensor.shape), dtype, dims, scalars)
    contents.entries.append(entry)
    parts = {VALUES: tensor}
    for key, value in (state or {}).items():
        if key in SCALARS:
            continue
        ours = key in (*MOMENTS, *MASTERS) and may_have(key, dtype)
        if not ours or not isinstance(value, Tensor):
            found.left_out.append(f"{key} of {name}")
        elif value.shape != tensor.shape:
            raise CheckpointError(
                f"{key} of {name}: expected the param's shape {tuple(tensor.shape)}, "
                f"found {tuple(value.shape)}"
            )
        else:
            parts[key] = value
    for part in ("exp_avg", "exp_avg_sq"):
        if state is not None and part not in parts:
            _missing(name, part)
    for part, value in parts.items():
        wanted = entry.file_dtype(part)[1]
        elements = flat(value, dims)
        if part in MASTERS and elements.dtype != wanted:
            # torch.optim has had it: it casts what it loads, and does not update it.
            found.left_out.append(f"{part} of {name}, which is {value.dtype} and stale")
            continue
        if part != VALUES and torch.promote_types(elements.dtype, wanted) != wanted:
            raise CheckpointError(f"{part} of {name}: expected {wanted}, found {value.dtype}")
        if value.numel():
            contents.pieces.append(Piece("param", name, part, 0, elements.to(wanted)))


def _missing(name: str, key: str) -> bool:
    raise CheckpointError(f"{name}: its optimizer state has no {key!r}")
