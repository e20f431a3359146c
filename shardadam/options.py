"""The arguments that torch.optim does not have, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch.distributed as dist

GradSync = Literal["mean", "none"]
Master = Literal["auto", "split", "fp32"]

DEFAULT_BUCKET_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Options:
    """See `shardadam.Adam` for what each means."""

    process_group: dist.ProcessGroup | None
    grad_sync: GradSync
    shard_grads: bool
    update_in_backward: bool
    max_grad_norm: float | None
    master: Master
    bucket_bytes: int

    def __post_init__(self) -> None:
        """Raise ValueError for what can't be."""
        _one_of("grad_sync", self.grad_sync, ("mean", "none"))
        _one_of("master", self.master, ("auto", "split", "fp32"))
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
        if self.bucket_bytes <= 0:
            raise ValueError(f"Invalid bucket_bytes: {self.bucket_bytes}, expected more than 0")

    def describe_grads(self) -> str:
        """How gradients are exchanged, for the user."""
        if self.update_in_backward:
            return f"updated in backward, grad_sync={self.grad_sync!r}"
        return "sharded in backward" if self.shard_grads else f"grad_sync={self.grad_sync!r}"

    def lines(self) -> list[str]:
        """What must be equal on every rank, a line each."""
        names = [field.name for field in fields(self) if field.name != "process_group"]
        return [f"{name}={getattr(self, name)!r}" for name in names]

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        """Shared by copies: a process group can't be copied, and need not be."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Without a process group: the default one is found again where it is read back."""
        if self.process_group not in (None, dist.group.WORLD if dist.is_available() else None):
            raise TypeError("an optimizer with a process_group of its own can't be serialized")
        return Options, (None, *(getattr(self, field.name) for field in fields(self)[1:]))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"Invalid {name}: {value!r}, expected {expected}")
