"""One torch file of a model and a full optimizer state dict as `RunState`, and back."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli.plain_load import load_plain
from shardadam.cli.run_state import RunState, groups_by, optimizer_of
from shardadam.cli.tensors import check_dense, check_model
from shardadam.shard_tensor import ShardTensor


def load(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any], list[str]]:
    """The model's dict, if it is there, the optimizer's, and what else the file has.

    Raises:
        CheckpointError: it is none, or needs code to be read.
    """
    value = load_plain(path, str(path), mapped=True)
    model, optim, rest = None, value, []
    if isinstance(value, dict) and "optim" in value:
        model, optim = value.get("model"), value["optim"]
        rest = [str(key) for key in value if key not in ("model", "optim")]
    if not (
        isinstance(optim, dict)
        and isinstance(optim.get("state"), dict)
        and isinstance(optim.get("param_groups"), list)
        and all(isinstance(entry, dict) for entry in optim["state"].values())
        and all(map(_is_group, optim["param_groups"]))
    ):
        raise CheckpointError(
            f'{path}: expected {{"model": …, "optim": …}}, or an optimizer\'s state dict'
        )
    if model is not None:
        model = check_model(model, str(path))
    for key, entry in optim["state"].items():
        if any(isinstance(tensor, ShardTensor) for tensor in entry.values()):
            raise CheckpointError(
                f"{path}: param {key}: this is one rank's part, expected the whole, which "
                "consolidate_state_dict() returns"
            )
    tensors = [
        (f"param {key}: {name}", value)
        for key, entry in optim["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    ]
    check_dense(tensors, str(path))
    return model, optim, rest


def _is_group(group: object) -> bool:
    ids = group.get("params") if isinstance(group, dict) else None
    return isinstance(ids, list) and all(isinstance(id, int | str) for id in ids)


def names_of(model: dict[str, Any] | None, optim: dict[str, Any], path: Path) -> dict[Any, str]:
    """The names of the numbers in "params".

    From "param_names"; without them, a single group of all that the model has, in its order.

    Raises:
        CheckpointError: they can't be known.
    """
    groups = optim["param_groups"]
    names = given_names(groups, path)
    if names is not None:
        return names
    ids = groups[0]["params"]
    if len(groups) == 1 and model is not None and len(ids) == len(model):
        pairs = list(zip(ids, model.items(), strict=True))
        moments = [optim["state"].get(id, {}).get("exp_avg", tensor) for id, (_, tensor) in pairs]
        if all(
            isinstance(moment, Tensor) and moment.shape == tensor.shape
            for moment, (_, (_, tensor)) in zip(moments, pairs, strict=True)
        ):
            return {id: name for id, (name, _) in pairs}
    raise CheckpointError(
        f"{path}: expected param_names in its param_groups, or one group of all the model's "
        "tensors: make the optimizer from model.named_parameters()"
    )


def given_names(groups: list[dict[str, Any]], path: Path) -> dict[Any, str] | None:
    """The names of the numbers in "params" by "param_names", if every group has those.

    Raises:
        CheckpointError: there are more or fewer of them.
    """
    names: dict[Any, str] = {}
    for group in groups:
        ids, given = group["params"], group.get("param_names")
        if given is None:
            return None
        if not isinstance(given, list) or len(given) != len(ids):
            raise CheckpointError(f"{path}: expected as many param_names as params")
        names |= {id: str(name) for id, name in zip(ids, given, strict=True)}
    return names


def read(path: Path) -> RunState:
    """Read a file.

    Raises:
        CheckpointError: it can't be read, or does not say what belongs to which param.
    """
    model, optim, rest = load(path)
    if model is None:
        raise CheckpointError(f'{path}: expected {{"model": …, "optim": …}}, found no "model"')
    names = names_of(model, optim, path)
    groups = groups_by(optim["param_groups"], str(path), names)
    state = {names.get(key, str(key)): dict(entry) for key, entry in optim["state"].items()}
    found = RunState(model, state, groups, optimizer_of(groups, state), rest)
    found.leave_out_strays()
    return found


def write(path: Path, found: RunState) -> None:
    """Write a new file and sync it."""
    numbers: dict[str, int] = {}
    groups, first = [], 0
    for group in found.groups:
        for place, name in enumerate(group.names, first):
            numbers.setdefault(name, place)
        first += len(group.names)
        ids = [numbers[name] for name in group.names]
        groups.append({**group.options, "param_names": group.names, "params": ids})
    state = {numbers[name]: entry for name, entry in found.state.items() if name in numbers}
    optim = {"state": dict(sorted(state.items())), "param_groups": groups}
    with open(path, "xb") as file:
        try:
            torch.save({"model": found.model, "optim": optim}, file)
        except RuntimeError as error:  # torch's writer, of a full disk
            raise OSError(f"{path}: writing failed: {error}") from error
        file.flush()
        os.fsync(file.fileno())
