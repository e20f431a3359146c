"""Coded moments in a checkpoint: what they stand for, which every format can hold."""

from typing import Any

from torch import Tensor

from shardadam.checkpoint.contents import flat
from shardadam.checkpoint.errors import CheckpointError
from shardadam.cli.run_state import RunState
from shardadam.kernels.random_bits import BLOCK
from shardadam.kernels.state_formats import FORMATS, StateFormat, decode, format_of, is_scale

_CODED = {n for form in FORMATS.values() if form.has_scales for n in form.tensors(True).values()}


def decode_moments(found: RunState) -> None:
    """Put moments in float32 in the place of codes; a note says so.

    Raises:
        CheckpointError: codes without what belongs to them, or of another shape than the param.
    """
    formats = set()
    for name, entry in found.state.items():
        codes = {str(k).partition("@")[0]: k for k in entry if str(k).partition("@")[0] in _CODED}
        if not codes:
            continue
        if not {"exp_avg", "exp_avg_sq"} <= entry.keys():  # as consolidate_state_dict() adds them
            form = format_of(codes)
            orders = {key.partition("@")[2] for base, key in codes.items() if is_scale(base)}
            whole = form is not None and any(
                codes.keys() == set(form.tensors(maximum).values()) for maximum in (False, True)
            )
            if form is None or not whole or len(orders) != 1 or name not in found.model:
                raise CheckpointError(f"{name}: expected whole coded moments, found {list(codes)}")
            formats.add(form.name)
            stored = {base: entry[key] for base, key in codes.items()}
            entry.update(_decoded(form, name, stored, found.model[name], orders.pop()))
        for key in codes.values():
            del entry[key]
    found.notes += [f"moments are decoded, they are {name} there" for name in sorted(formats)]


def _decoded(
    form: StateFormat, name: str, stored: dict[str, Any], like: Tensor, order: str
) -> dict[str, Tensor]:
    """``order``: of the dims in memory, as `FlatBucket.shown_name` has it."""
    long = [dim for dim in range(like.dim()) if like.shape[dim] != 1]
    if order and sorted(order.split("-")) != sorted(map(str, long)):
        raise CheckpointError(f"{name}: expected an order of its dims, found {order!r}")
    dims = [int(dim) for dim in order.split("-")] if order else long
    blocks = -(-like.numel() // BLOCK)
    for key, tensor in stored.items():
        shape = (blocks,) if is_scale(key) else tuple(like.shape)
        dtype = form.dtype(key, like.dtype)
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != dtype:
            raise CheckpointError(f"{name}: expected {key} of shape {shape} and {dtype}")
    dims = [*dims, *(dim for dim in range(like.dim()) if like.shape[dim] == 1)]
    flats = {k: t if is_scale(k) else flat(t, tuple(dims)) for k, t in stored.items()}
    back = [dims.index(dim) for dim in range(like.dim())]
    return {
        moment: values.view([like.shape[dim] for dim in dims]).permute(back)
        for moment, values in decode(form, flats).items()
    }
