"""A model and its optimizer's state, whole and on the host: what every format can hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError

SCALARS = ("step", "mu_product")
"""State of one number, for every param."""
TORCH_OPTIONS: dict[str, object] = {
    **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False),
    **dict.fromkeys(("foreach", "fused")),
}
"""Of torch's groups, and not of others': torch.distributed.checkpoint misses what is not there."""


@dataclass(frozen=True, slots=True)
class Group:
    """A param group: names and hyperparameters."""

    names: list[str]
    options: dict[str, Any]


@dataclass(slots=True)
class RunState:
    """Params and buffers by name, the state of params by name, their groups.

    ``optimizer``: the name of its class, if it is known. ``left_out``: what was found besides.
    ``tied``: further names of params that are in the model by each, and their first.
    ``notes``: what else whoever converts it should know.
    """

    model: dict[str, Tensor]
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    optimizer: str | None = None
    left_out: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """That the optimizer has done."""
        steps = (number_of(entry.get("step", 0), "step") for entry in self.state.values())
        return int(max(steps, default=0))

    def leave_out_strays(self) -> None:
        """State of what is in no group: users and hooks keep things there."""
        known = {name for group in self.groups for name in group.names}
        for name in [name for name in self.state if name not in known]:
            del self.state[name]
            self.left_out.append(f"state[{name!r}], of no param")


def groups_by(saved: object, where: str, names: Mapping[Any, str] | None) -> list[Group]:
    """A state dict's "param_groups"; ``names``: of what is in "params", None where those are names.

    Raises:
        CheckpointError: they are none.
    """
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
        raise CheckpointError(f"{where}: expected param_groups, a list of dicts")
    groups = []
    for number, group in enumerate(saved):
        keys = group.get("params")
        if not isinstance(keys, list | tuple) or not all(isinstance(k, int | str) for k in keys):
            raise CheckpointError(f"{where}: group {number}: expected a list of params")
        try:
            found = [key if names is None else names[key] for key in keys]
        except KeyError as error:
            raise CheckpointError(f"{where}: group {number}: param {error} has no name") from error
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append(Group([str(name) for name in found], options))
    return groups


def optimizer_of(groups: list[Group], state: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The class that has these hyperparameters."""
    if any("mu_product" in entry for entry in state.values()):
        return "NAdam"
    options = groups[0].options if groups else {}
    if "momentum_decay" in options:
        return "NAdam"
    decoupled = options.get("decoupled_weight_decay")
    return None if decoupled is None else "AdamW" if decoupled else "Adam"


def number_of(value: object, where: str) -> float:
    """A step counter, as a tensor or as older torch saved it.

    Raises:
        CheckpointError: it is none.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or not abs(value) <= 2**53:
        raise CheckpointError(f"{where}: expected a number, found {value!r}"[:300])
    return float(value)


def as_scalar(name: str, number: float) -> Tensor:
    """As our optimizers keep it."""
    return torch.tensor(number, dtype=torch.float32 if name == "step" else torch.float64)
