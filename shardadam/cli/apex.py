"""Checkpoints of apex's DistributedFusedAdam as `RunState`.

Its state dicts have numbers for params, one step for all, and in newer files ("v2") the whole state
in the params' shapes, "param" being the master weight. Older ones are in [Note: apex's shards]. The
layout was read in apex's source; apex was not run.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli import apex_shards
from shardadam.cli.masters import PARAMS, near, settle
from shardadam.cli.plain_load import load_plain
from shardadam.cli.run_state import TORCH_OPTIONS, RunState, as_scalar, groups_by, number_of
from shardadam.cli.tensors import check_dense, check_model, is_dense
from shardadam.cli.torchfile import given_names

_OPTIMIZER = ("optim", "optimizer")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_DROPPED = ("bias_correction", "step")


@dataclass(slots=True)
class Saved:
    """What files hold: state by the numbers of params; flat in memory's order where ``ranks``."""

    layout: str
    path: Path
    model: dict[str, Tensor] | None
    groups: list[dict[str, Any]]
    step: float
    state: dict[int, dict[str, Tensor]]
    ranks: int = 0
    rest: list[str] = field(default_factory=list)


def is_apex(path: Path) -> bool:
    """Whether a file, or a folder with one for each rank, is such a checkpoint."""
    files = files_of(path)
    try:
        return bool(files) and _is_optimizer(_split(_load(files[0]))[0])
    except CheckpointError:
        return False


def load(path: Path, model: Path | None = None) -> Saved:
    """Read it all; ``model``: a torch file with the model, where ``path`` has none.

    Raises:
        CheckpointError: it can't be read, or is not whole.
    """
    found, optimizers, rest = None, [], list[str]()
    for file in files_of(path):
        optim, own, others = _split(_load(file))
        if not _is_optimizer(optim):
            raise CheckpointError(f"{file}: expected the state dict of a DistributedFusedAdam")
        optimizers.append((str(file), optim))
        found = own if found is None else found
        rest = others if len(optimizers) == 1 else rest
    if model is not None:
        value = load_plain(model, str(model), mapped=zipfile.is_zipfile(model))
        found = value.get("model", value) if isinstance(value, dict) else value
    if found is not None:
        found = check_model(found, str(model or path))
    where, first = optimizers[0]
    known = ("state", "param_groups", "format", "gathered_states")
    rest += [f"{key} of the optimizer" for key in first if key not in known]
    if all(apex_shards.is_rank(optim) for _, optim in optimizers):
        layout, ranks = "v1, a file for each rank", optimizers
    elif len(optimizers) > 1:
        raise CheckpointError(f"{path}: expected a rank's state in every file, or one file")
    elif "gathered_states" in first:
        inner = apex_shards.opened(first["gathered_states"], where)
        layout = "v1, gathered"
        ranks = [(f"{where}: rank {rank}", optim) for rank, optim in enumerate(inner)]
    else:
        groups, step = _same_on_all(optimizers)
        return Saved("v2", path, found, groups, step, _whole(first["state"], where), 0, rest)
    groups, step = _same_on_all(ranks)
    state = apex_shards.put_together(ranks, str(path))
    return Saved(layout, path, found, groups, step, state, len(ranks), rest)


def read(path: Path, model: Path | None = None, optimizer: str | None = None) -> RunState:
    """As `load`, by names and in our form; ``optimizer``: "Adam" or, for ``adam_w_mode``, "AdamW".

    Raises:
        CheckpointError: what belongs to which param can't be known, or the model is another.
    """
    saved = load(path, model)
    if saved.model is None:
        raise CheckpointError(
            f'{path}: expected {{"model": …, "optimizer": …}}, found no "model" (--model FILE)'
        )
    if optimizer not in (None, "Adam", "AdamW"):
        raise CheckpointError(f"{path}: expected an Adam or AdamW, found {optimizer!r}")
    names = names_of(saved)
    decoupled = {"decoupled_weight_decay": optimizer != "Adam"}
    options = [
        {**TORCH_OPTIONS, **decoupled, **{k: v for k, v in group.items() if k not in _DROPPED}}
        for group in saved.groups
    ]
    found = RunState(dict(saved.model), groups=groups_by(options, str(path), names))
    found.optimizer, found.left_out = optimizer or "AdamW", saved.rest
    if optimizer is None:
        found.notes.append("taken for AdamW's: apex does not save its adam_w_mode (--optimizer)")
    rounded: dict[str, int] = {}
    for id, parts in saved.state.items():
        name = names.get(id, f"param {id}")
        tensor = saved.model.get(name)
        if tensor is None and id in names:
            raise CheckpointError(f"{model or path}: expected {name!r} in the model, found none")
        if tensor is None:
            found.left_out.append(f"state of {name}, which is in no group")
            continue
        _check_like(f"{path}: {name}", tensor, parts, flat=saved.ranks > 0)
        shaped = {
            part: _shaped(value, tensor) if saved.ranks else value for part, value in parts.items()
        }
        state: dict[str, Any] = {"step": as_scalar("step", saved.step)}
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        for part in _MOMENTS:
            # A param without elements has no fragments.
            state[part] = shaped[part].to(wide) if shaped else torch.empty(tensor.shape, dtype=wide)
        if "remainder" in shaped:
            state["remainder"] = shaped["remainder"]
        else:
            # Kept by nothing, the param is its own master.
            master = shaped.get("param", tensor)
            values, more, changes = settle(tensor, master, f"{path}: {name}")
            state |= more
            if changes:
                found.model[name] = values
                rounded[name] = changes
        found.state[name] = state
    if rounded:
        found.notes.append(
            f"{sum(rounded.values())} elements of {len(rounded)} params were not their master "
            f"weights rounded to nearest: they are now ({', '.join(list(rounded)[:3])}"
            f"{', …' * (len(rounded) > 3)})"
        )
    return found


def names_of(saved: Saved) -> dict[int, str]:
    """The names of the params' numbers.

    From "param_names". Else by order, if there is one group of all that the model has; else by the
    master weights: what they round to is in the model.

    Raises:
        CheckpointError: they can't be known.
    """
    given = given_names(saved.groups, saved.path)
    if given is not None:
        return given
    path, model = saved.path, saved.model
    if model is None:
        raise CheckpointError(f"{path}: expected param_names, or a model to take the names from")
    ids = [id for group in saved.groups for id in group["params"]]
    ordered = dict(zip(ids, model, strict=False))
    if len(saved.groups) == 1 and len(ids) == len(model):
        # Without a gradient so far, a param has no state.
        pairs = [(saved.state[id], model[n]) for id, n in ordered.items() if id in saved.state]
        if all(_may_be(parts, tensor, saved.ranks > 0) for parts, tensor in pairs):
            return ordered
    names: dict[int, str] = {}
    for id in ids:
        parts = saved.state.get(id, {})
        known = model.items() if "param" in parts else ()
        alike = [name for name, tensor in known if _may_be(parts, tensor, saved.ranks > 0)]
        if len(alike) != 1 or alike[0] in names.values():
            many = "several of the model's tensors with" if alike else "nothing in the model by"
            raise CheckpointError(
                f"{path}: expected param_names in its param_groups, or one group of all the model "
                f"has in the same order; param {id}: found {many} its master weights' values"
            )
        names[id] = alike[0]
    return names


def _may_be(parts: Mapping[str, Tensor], tensor: Tensor, flat: bool) -> bool:
    """Whether this can be the state of ``tensor``."""
    try:
        _check_like("", tensor, parts, flat)
    except CheckpointError:
        return False
    if "param" not in parts:
        return True
    master = _shaped(parts["param"], tensor) if flat else parts["param"]
    # A few elements tell most of them apart.
    few = slice(0, 256)
    return near(tensor.flatten()[few], master.flatten()[few]) and near(tensor, master)


def _check_like(where: str, tensor: Tensor, parts: Mapping[str, Tensor], flat: bool) -> None:
    if tensor.dtype not in PARAMS or not is_dense(tensor):
        raise CheckpointError(
            f"{where}: expected a dense float tensor, found {tensor.dtype} ({tensor.layout})"
        )
    if "remainder" in parts and tensor.dtype != torch.bfloat16:
        raise CheckpointError(f"{where}: expected bfloat16 for remainders, found {tensor.dtype}")
    if not parts and tensor.numel():
        raise CheckpointError(f"{where}: expected its optimizer state, found no elements of it")
    for part, value in parts.items():
        if value.numel() != tensor.numel() or not (flat or value.shape == tensor.shape):
            raise CheckpointError(
                f"{where}: expected {part} of shape {tuple(tensor.shape)}, "
                f"found {tuple(value.shape)}"
            )


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """Flat elements in a param's shape: apex flattens channels_last params as they lie."""
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)


# ---- files --------------------------------------------------------------------------------------


def files_of(path: Path) -> list[Path]:
    """The file itself, or the ranks' files in a folder."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))


def _load(file: Path) -> Any:
    return load_plain(file, str(file), mapped=True, stand_ins=apex_shards.STAND_INS)


def _split(value: Any) -> tuple[Any, Any, list[str]]:
    """The optimizer's dict, the model's, and what else a file has."""
    keys = [key for key in _OPTIMIZER if isinstance(value, dict) and key in value]
    if len(keys) != 1:
        return value, None, []
    rest = [str(key) for key in value if key not in ("model", keys[0])]
    return value[keys[0]], value.get("model"), rest


def _is_optimizer(optim: Any) -> bool:
    if not isinstance(optim, dict):
        return False
    state = optim.get("state")
    # torch's have nothing but params in "state".
    newer = isinstance(state, dict) and "step" in state and "param_groups" in optim
    return "gathered_states" in optim or apex_shards.is_rank(optim) or newer


def _same_on_all(ranks: list[tuple[str, dict[str, Any]]]) -> tuple[list[dict[str, Any]], float]:
    """The param groups and the step, which every rank has."""
    found: list[tuple[list[dict[str, Any]], float]] = []
    for where, optim in ranks:
        groups = optim.get("param_groups")
        if not isinstance(groups, list) or not all(
            isinstance(g, dict)
            and isinstance(g.get("params"), list)
            and all(isinstance(id, int) for id in g["params"])
            for g in groups
        ):
            raise CheckpointError(f"{where}: expected param_groups with the numbers of params")
        # dist_checkpointing moves it there.
        step = optim["state"].get("step", groups[0].get("step") if groups else None)
        found.append((groups, number_of(step, f"{where}: step")))
        for number, group in enumerate(groups):
            corrects = group.get("bias_correction", True)
            if type(corrects) not in (bool, int) or not corrects:
                raise CheckpointError(
                    f"{where}: group {number}: expected bias_correction, which ours always does"
                )
        ids = [[group["params"] for group in groups] for groups, _ in (found[0], found[-1])]
        if ids[0] != ids[1] or found[0][1] != found[-1][1]:
            raise CheckpointError(f"{where}: expected {ranks[0][0]}'s step and params, found other")
    return found[0]


def _whole(state: dict[Any, Any], where: str) -> dict[int, dict[str, Tensor]]:
    """The entries of a v2 file."""
    found: dict[int, dict[str, Tensor]] = {}
    for id, entry in state.items():
        if id == "step":
            continue
        if not (
            isinstance(entry, dict)
            and all(is_dense(entry.get(part)) for part in (*_MOMENTS, "param"))
        ):
            raise CheckpointError(f"{where}: param {id}: expected param, exp_avg and exp_avg_sq")
        found[id] = {part: entry[part] for part in (*_MOMENTS, "param")}
        if not all(tensor.is_floating_point() for tensor in found[id].values()):
            raise CheckpointError(f"{where}: param {id}: expected float tensors")
        check_dense(found[id].items(), f"{where}: param {id}")
    return found
