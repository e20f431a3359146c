"""Python values as JSON and back: what schedulers, param groups and users hand over.

JSON has neither tuples, nor infinities, nor keys other than strings; what it lacks becomes an
object with one key that starts with "$". Nothing else is taken, so that reading executes nothing.
"""

import collections
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError

_DEPTH = 60  # levels of nesting; Python's own JSON reader gives up at some hundreds
_SCALARS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)
}


def encode(value: object, where: str, depth: int = 0) -> Any:
    """``value`` as JSON can hold it; ``where`` is what errors call it.

    Raises:
        CheckpointError: it contains something else.
    """
    if depth > _DEPTH:
        raise CheckpointError(f"{where}: nested deeper than {_DEPTH} levels")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if value.bit_length() > 4096:
            raise CheckpointError(f"{where}: an int of {value.bit_length()} bits, expected 4096")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.numel() == 1 and value.dim() < 8 and dtype in _SCALARS:
            number = encode(value.item(), where, depth + 1)
            return {"$tensor": [dtype, list(value.shape), number]}
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": encode(list(value), where, depth + 1)}
    if isinstance(value, dict):
        items = [
            [encode(key, f"a key of {where}", depth + 1), encode(v, f"{where}[{key!r}]", depth + 1)]
            for key, v in value.items()
        ]
        if isinstance(value, collections.Counter):
            return {"$counter": items}
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(items)
        return {"$dict": items}
    found = f"{type(value).__name__} {value!r}"
    raise CheckpointError(
        f"{where}: expected what JSON can hold (None, bool, int, float, str, list, tuple, dict, a "
        f"tensor of one element), found {found if len(found) < 200 else found[:200] + '…'}"
    )


def decode(value: Any, where: str, depth: int = 0) -> Any:
    """What `encode` was given.

    Raises:
        CheckpointError: `encode` can't have made it.
    """
    if depth > 3 * _DEPTH:
        raise CheckpointError(f"{where}: nested deeper than {_DEPTH} levels")
    if isinstance(value, list):
        return [decode(item, where, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("$")]
    if not tags:
        return {key: decode(item, where, depth + 1) for key, item in value.items()}
    if len(value) == 1 and tags[0] in _DECODERS:
        try:
            return _DECODERS[tags[0]](decode(value[tags[0]], where, depth + 1))
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"{where}: bad {tags[0]}: {error}") from error
    raise CheckpointError(f"{where}: expected an object without keys in $, found {tags[0][:40]!r}")


def _float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError("expected nan, inf or -inf")
    return float(text)


def _tensor(parts: list[Any]) -> Tensor:
    dtype, shape, number = parts
    if any(size != 1 for size in shape) or len(shape) > 8 or isinstance(number, list | dict | str):
        raise ValueError("expected one element")
    return torch.full(tuple(shape), number, dtype=_SCALARS[str(dtype)])


def _pairs(items: list[Any]) -> dict[Any, Any]:
    pairs = {key: item for key, item in items}
    if len(pairs) != len(items):
        raise ValueError("a key stands twice")
    return pairs


def _tuple(items: Any) -> tuple[Any, ...]:
    if not isinstance(items, list):
        raise ValueError("expected a list")
    return tuple(items)


def _counter(items: list[Any]) -> dict[Any, int]:
    return collections.Counter(_pairs(items))


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": _float,
    "$tensor": _tensor,
    "$tuple": _tuple,
    "$dict": _pairs,
    "$counter": _counter,
}
