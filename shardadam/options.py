"""The arguments that torch.optim does not have, checked once."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

GradSync = Literal["mean", "none"]
State = Literal["fp32", "bf16", "q16", "q8"]
Master = Literal["auto", "fp32", "split", "split8", "none"]
Memory = Literal["full", "lean", "leanest"]
Offload: TypeAlias = "Literal['cpu'] | os.PathLike[str]"

DEFAULT_BUCKET_BYTES = 16 * 2**20

_MEMORY: dict[Memory, tuple[State, Master]] = {
    "full": ("fp32", "auto"),
    "lean": ("q16", "split"),
    "leanest": ("q8", "split8"),
}
_STATES = ("fp32", "bf16", "q16", "q8")
_MASTERS = ("auto", "fp32", "split", "split8", "none")


def formats(memory: Memory | None, state: State, master: Master) -> tuple[State, Master]:
    """``state`` and ``master``, or those that ``memory`` stands for.

    Raises:
        ValueError: an unknown name, or both are given.
    """
    if memory is None:
        return state, master
    _one_of("memory", memory, tuple(_MEMORY))
    if (state, master) != ("fp32", "auto"):
        raise ValueError(
            f"memory={memory!r} stands for a state and a master, found state={state!r} and "
            f"master={master!r} beside it: expected the one or the others"
        )
    return _MEMORY[memory]


@dataclass(frozen=True)
class Options:
    """See `shardadam.Adam` for what each means."""

    process_group: dist.ProcessGroup | None
    mesh: DeviceMesh | None
    replicate_state: bool
    grad_sync: GradSync
    shard_grads: bool
    update_in_backward: bool
    max_grad_norm: float | None
    state: State
    master: Master
    offload: Offload | None
    bucket_bytes: int
    seed: int
    check_replicas_every: int | None = None
    check_state: bool = False
    exact_microbatches: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for what can't be."""
        self._check_mesh()
        _one_of("grad_sync", self.grad_sync, ("mean", "none"))
        _one_of("state", self.state, _STATES)
        _one_of("master", self.master, _MASTERS)
        if self.shard_grads and self.grad_sync == "none":
            raise ValueError(
                'shard_grads=True reduces gradients during backward, grad_sync="none" says that '
                "they are not to be reduced: expected one of the two"
            )
        if self.update_in_backward and self.max_grad_norm is not None:
            raise ValueError(
                "update_in_backward=True updates params before all gradients are there, and "
                "max_grad_norm clips by the norm of all: expected one of the two"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm: {self.max_grad_norm}, expected more than 0")
        if self.offload not in (None, "cpu") and not isinstance(self.offload, os.PathLike):
            raise ValueError(
                f"Invalid offload: {self.offload!r}, expected 'cpu' or a directory as a "
                "pathlib.Path"
            )
        if self.directory is not None and not hasattr(os, "posix_fallocate"):
            raise ValueError("offload: this system can't reserve space in a file, expected Linux")
        if self.bucket_bytes <= 0:
            raise ValueError(f"Invalid bucket_bytes: {self.bucket_bytes}, expected more than 0")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"Invalid seed: {self.seed!r}, expected an int of 64 bits")
        every = self.check_replicas_every
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(
                f"Invalid check_replicas_every: {every!r}, expected a number of steps, or None"
            )
        self._check_microbatches()
        if self.check_state and self.directory is not None:
            raise ValueError(
                "check_state=True reads all state before each step, and offload= streams it from a "
                "file so that it need not be in memory: expected one of the two"
            )

    def _check_microbatches(self) -> None:
        number = self.exact_microbatches
        if number is None:
            return
        if type(number) is not int or number < 1:
            raise ValueError(
                f"Invalid exact_microbatches: {number!r}, expected the number of microbatches of a "
                "step over all ranks, or None"
            )
        others = {
            "mesh=": self.mesh is not None,
            "shard_grads=True": self.shard_grads,
            "update_in_backward=True": self.update_in_backward,
            'grad_sync="none"': self.grad_sync == "none",
        }
        for other, given in others.items():
            if given:
                raise ValueError(
                    "exact_microbatches sums gradients over all ranks in an order of its own, in "
                    f"step(), and {other} does otherwise: expected one of the two"
                )

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError for microbatches of which ranks can't have equally many."""
        number = self.exact_microbatches
        if number is not None and number % world_size:
            raise ValueError(
                f"exact_microbatches={number}: expected a multiple of the world size, which is "
                f"{world_size}"
            )

    def _check_mesh(self) -> None:
        if self.mesh is None:
            if self.replicate_state:
                raise ValueError("replicate_state=True: expected mesh=, which says over what")
            return
        if not isinstance(self.mesh, DeviceMesh) or self.mesh.ndim != 2:
            raise ValueError(
                f"Invalid mesh: {self.mesh!r}, expected a DeviceMesh of 2 dims: nodes, and the "
                "ranks of each"
            )
        if self.process_group is not None:
            raise ValueError(
                "mesh= has process groups of its own, found process_group= beside it: expected one "
                "of the two"
            )

    @property
    def directory(self) -> Path | None:
        """Where the file is that state is offloaded to, if it is to one."""
        return Path(self.offload) if isinstance(self.offload, os.PathLike) else None

    def describe_grads(self) -> str:
        """How gradients are exchanged, for the user."""
        if self.update_in_backward:
            return f"updated in backward, grad_sync={self.grad_sync!r}"
        if self.exact_microbatches is not None:
            return f"summed exactly over {self.exact_microbatches} microbatches"
        return "sharded in backward" if self.shard_grads else f"grad_sync={self.grad_sync!r}"

    def lines(self) -> list[str]:
        """What must be equal on every rank, a line each; its directory may be a rank's own."""
        own = ("process_group", "mesh", "offload")
        names = [field.name for field in fields(self) if field.name not in own]
        lines = [f"{name}={getattr(self, name)!r}" for name in names]
        kind = "to a directory" if self.directory is not None else f"= {self.offload!r}"
        ranks = None if self.mesh is None else self.mesh.mesh.tolist()
        return [*lines, f"mesh of {ranks}", f"offload {kind}"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        """Shared by copies: a process group can't be copied, and need not be."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Without a process group: the default one is found again where it is read back."""
        if self.process_group not in (None, dist.group.WORLD if dist.is_available() else None):
            raise TypeError("an optimizer with a process_group of its own can't be serialized")
        if self.mesh is not None:
            raise TypeError("an optimizer with mesh= can't be serialized: its state_dict() can")
        return Options, (None, *(getattr(self, field.name) for field in fields(self)[1:]))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"Invalid {name}: {value!r}, expected {expected}")
