"""`inspect`: what a checkpoint holds."""

import math
import reprlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shardadam.checkpoint.contents import dtype_name
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.manifest import Manifest, file_name
from shardadam.checkpoint.verifying import Opened
from shardadam.cli import apex, deepspeed_files
from shardadam.cli.dcp import Folder
from shardadam.cli.deepspeed import groups_of
from shardadam.cli.recognising import Format, recognise
from shardadam.cli.run_state import SCALARS
from shardadam.cli.summary import File, Row, Summary, show
from shardadam.cli.telling import DAMAGED, WHOLE
from shardadam.cli.torchfile import load, names_of


def inspect(path: Path) -> int:
    """Print a summary and return the exit code.

    Raises:
        CheckpointError: it can't be read.
    """
    found = recognise(path)
    summary = _SUMMARIES[found.format](found.path)
    show(summary)
    return DAMAGED if any(file.wrong for file in summary.files) else WHOLE


def _of_ours(path: Path) -> Summary:
    with Opened(path) as opened:
        manifest = opened.manifest
        documents = manifest.documents
        facts = {"step": str(manifest.step), "world size": str(len(manifest.files))}
        if isinstance(documents.get("optimizer"), str):
            facts["optimizer"] = documents["optimizer"]
        groups = documents.get("groups")
        for number, group in enumerate(groups if isinstance(groups, list) else []):
            if isinstance(group, dict) and isinstance(group.get("options"), dict):
                count = len(group["names"]) if isinstance(group.get("names"), list) else 0
                facts[f"group {number}"] = f"{count} params, {_options(group['options'])}"
        extras = documents.get("extras")
        besides = [name for name in ("lr_scheduler",) if name in documents]
        besides += [f"extras[{name!r}]" for name in extras] if isinstance(extras, dict) else []
        if besides:
            facts["also"] = ", ".join(besides)
        files = []
        for rank in range(len(manifest.files)):
            name, nbytes = file_name(rank, len(manifest.files)), manifest.layout(rank)[1][-1]
            try:
                opened.file(rank)
                files.append(File(name, nbytes))
            except CheckpointError as error:
                wrong = str(error).removeprefix(f"{opened.where(rank)}: ")
                files.append(File(name, nbytes, wrong))
        return Summary(f"shardadam checkpoint {path}", facts, _rows(manifest), files)


def _of_dcp(path: Path) -> Summary:
    folder = Folder(path)
    rows, holds, sizes, besides = [], defaultdict[str, list[str]](list), Counter[str](), []
    params = []
    for key, keys in folder.paths.items():
        if not folder.is_tensor(key):
            if keys[:2] != ("optim", "param_groups"):
                besides.append(key)
            continue
        shape, dtype = folder.like(key)
        nbytes = math.prod(shape) * dtype.itemsize
        if len(keys) == 4 and keys[:2] == ("optim", "state"):
            holds[str(keys[2])].append(str(keys[3]))
            sizes[str(keys[2])] += nbytes
        else:
            name = ".".join(map(str, keys[1:] if keys[0] == "model" else keys))
            params.append((name, shape, str(dtype).removeprefix("torch."), nbytes))
    for name, shape, stored, nbytes in params:
        rows.append(Row(name, shape, stored, " ".join(holds[name]), nbytes + sizes[name]))
    files = []
    for name, end in folder.files().items():
        try:
            found = (path / name).stat().st_size
            wrong = f"expected {end} bytes or more, found {found}" if found < end else ""
        except OSError as error:
            found, wrong = 0, f"expected a file, found: {error.strerror}"
        files.append(File(name, found, wrong))
    facts = {"also": ", ".join(besides)} if besides else {}
    return Summary(f"torch.distributed.checkpoint {path}", facts, rows, files)


def _of_torch(path: Path) -> Summary:
    model, optim, rest = load(path)
    ids = [id for group in optim["param_groups"] for id in group["params"]]
    try:
        names = names_of(model, optim, path)
    except CheckpointError:  # numbers say something too
        names = {id: f"param {id}" for id in [*ids, *optim["state"]]}
    tensors = dict(model or {})
    rows = []
    state = {names.get(id, str(id)): entry for id, entry in optim["state"].items()}
    for name in dict.fromkeys([*tensors, *state]):
        own = {k: v for k, v in state.get(name, {}).items() if isinstance(v, Tensor)}
        tensor = tensors.get(name, own.get("exp_avg"))
        holds = [
            f"{k}={v.item():g}" if k in SCALARS and v.numel() == 1 else k for k, v in own.items()
        ]
        nbytes = sum(
            v.nbytes for v in [*own.values(), *([tensors[name]] if name in tensors else [])]
        )
        shape, dtype = ((), "") if tensor is None else (tuple(tensor.shape), dtype_name(tensor))
        rows.append(Row(name, shape, dtype, " ".join(holds), nbytes))
    facts = {"model": "yes" if model is not None else "no, an optimizer's state alone"}
    for number, group in enumerate(optim["param_groups"]):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        facts[f"group {number}"] = f"{len(group['params'])} params, {_options(options)}"
    if rest:
        facts["also"] = ", ".join(rest)
    return Summary(f"torch file {path}", facts, rows, [File(path.name, path.stat().st_size)])


def _of_deepspeed(path: Path) -> Summary:
    files = deepspeed_files.load(path)
    facts = {"world size": str(len(files.ranks)), "DeepSpeed": str(files.model.get("ds_version"))}
    module, holds = files.model["module"], {}
    for number, group in enumerate(groups_of(files)):
        shown = {k: v for k, v in group.options.items() if k != "params"}
        facts[f"group {number}"] = f"{len(group.places)} params, {_options(shown)}"
        scalars = [f"{key}={value:g}" for key, value in group.scalars().items()]
        for place in group.places:
            holds[place.name] = [*scalars, *group.moments, "master"]
    rows = []
    for name, tensor in module.items():
        own = holds.get(name, [])
        parts = sum(part not in SCALARS and "=" not in part for part in own)
        nbytes = tensor.nbytes + parts * 4 * tensor.numel()
        rows.append(Row(name, tuple(tensor.shape), dtype_name(tensor), " ".join(own), nbytes))
    stored = [File(name, (path / name).stat().st_size) for name in files.names]
    return Summary(f"DeepSpeed ZeRO-{files.stage} checkpoint {path}", facts, rows, stored)


def _of_apex(path: Path) -> Summary:
    saved = apex.load(path)
    try:
        names = apex.names_of(saved)
    except CheckpointError:  # numbers say something too
        names = {}
    state = {names.get(id, f"param {id}"): parts for id, parts in saved.state.items()}
    model, rows = saved.model or {}, []
    for name in dict.fromkeys([*model, *state]):
        parts = state.get(name, {})
        tensors = [*parts.values(), *([model[name]] if name in model else [])]
        like = model.get(name, parts.get("exp_avg"))
        shape, dtype = ((), "") if like is None else (tuple(like.shape), dtype_name(like))
        holds = [f"{part}:{dtype_name(tensor)}" for part, tensor in parts.items()]
        rows.append(Row(name, shape, dtype, " ".join(holds), sum(t.nbytes for t in tensors)))
    facts = {
        "layout": saved.layout + (f", {saved.ranks} ranks" if saved.ranks else ""),
        "step": f"{saved.step:g}",
        "model": "yes" if saved.model is not None else "no, an optimizer's state alone",
    }
    for number, group in enumerate(saved.groups):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        facts[f"group {number}"] = f"{len(group['params'])} params, {_options(options)}"
    if saved.rest:
        facts["also"] = ", ".join(saved.rest)
    files = [File(file.name, file.stat().st_size) for file in apex.files_of(path)]
    return Summary(f"apex DistributedFusedAdam {path}", facts, rows, files)


_SUMMARIES = {
    Format.OURS: _of_ours,
    Format.DCP: _of_dcp,
    Format.TORCH: _of_torch,
    Format.DEEPSPEED: _of_deepspeed,
    Format.APEX: _of_apex,
}


def _rows(manifest: Manifest) -> list[Row]:
    parts: dict[int, dict[str, int]] = {}
    for shard in (shard for shards in manifest.files for shard in shards):
        entry = manifest.entries[shard.entry]
        counts = parts.setdefault(shard.entry, {})
        itemsize = entry.file_dtype(shard.part)[1].itemsize
        counts[shard.part] = counts.get(shard.part, 0) + shard.numel * itemsize
    rows = []
    for number, entry in enumerate(manifest.entries):
        here = parts.get(number, {})
        scalars = [f"{key}={value:g}" for key, value in (entry.scalars or {}).items()]
        holds = [part for part in here if part not in ("values", "extra", "rng")]
        if entry.kind != "param":
            holds = [f"({entry.kind})"]
        row = (entry.name, entry.shape, entry.dtype, " ".join([*scalars, *holds]))
        rows.append(Row(*row, sum(here.values())))
    return rows


def _options(options: Mapping[str, Any]) -> str:
    """The hyperparameters that are not off."""
    shown = []
    for key, value in options.items():
        if isinstance(value, dict) and len(value) == 1:  # what JSON lacks, see `plain`
            (value,) = value.values()
        if isinstance(value, dict | list | tuple):
            value = reprlib.repr(value)  # short, however many values a file puts in there
        if value is not None and value is not False:
            shown.append(f"{key} {value}")
    return ", ".join(shown)
