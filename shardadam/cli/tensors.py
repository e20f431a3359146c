"""Tensors of others' files: every element is in the file, and on the host."""

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError

_SPREAD = 2**24
"""Bytes that expanded tensors may have in any file, however small."""


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor whose elements are all here."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
    )


def check_model(model: object, where: str) -> dict[str, Tensor]:
    """A model's state dict, if it is one.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(model, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in model.items()
    ):
        raise CheckpointError(f'{where}: expected "model" to be a dict of tensors by their names')
    check_dense(model.items(), where)
    return model


def check_dense(named: Iterable[tuple[Any, Tensor]], where: str) -> None:
    """See that they are dense, and about as large as what is stored of them.

    A stride of 0 makes of one stored element as many as a file pleases, and what is converted has
    them all in memory.

    Raises:
        CheckpointError: one is not, or they are far larger.
    """
    stored: dict[int, int] = {}
    expanded = 0
    for name, tensor in named:
        if not is_dense(tensor):
            kinds = {"nested": tensor.is_nested, "quantized": tensor.is_quantized}
            kind = next((kind for kind, it_is in kinds.items() if it_is), str(tensor.layout))
            raise CheckpointError(
                f"{where}: {name}: expected a dense tensor on the CPU, found {kind} on "
                f"{tensor.device.type}"
            )
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        expanded += max(0, tensor.nbytes - storage.nbytes())
    most = max(_SPREAD, sum(stored.values()))
    if expanded > most:
        raise CheckpointError(
            f"{where}: expected at most {most} bytes in expanded tensors, whose elements are "
            f"stored once for many, found {expanded}"
        )
