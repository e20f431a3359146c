"""Filling params and their state with what a checkpoint has, whatever the formats and strides."""

from collections.abc import Iterator

import torch
from torch import Tensor

from shardadam.checkpoint.contents import dims_of, dtype_name, flat
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.parts import VALUES, parts_of
from shardadam.checkpoint.reading import Reader, same_order
from shardadam.kernels.reference import split8_master, split_master
from shardadam.kernels.state_formats import MASTERS, encode, part_of
from shardadam.shards import ParamShard

_CONVERTED_AT_ONCE = 2**20  # elements, a whole number of blocks


def write_shard(reader: Reader, index: int, shard: ParamShard) -> None:
    """Fill one param's elements on this rank, their master weights and moments."""
    entry = reader.entries[index]
    for name, scalar in shard.scalars.items():
        initial = 1.0 if name == "mu_product" else 0.0
        scalar.fill_((entry.scalars or {}).get(name, initial))
    if not shard.numel:
        return
    _write_master(reader, index, shard)
    if entry.scalars is None:
        for name in shard.form.tensors(True).values():
            if name in shard.tensors:
                shard.tensors[name].zero_()
    else:
        _write_moments(reader, index, shard)


def _write_master(reader: Reader, index: int, shard: ParamShard) -> None:
    """Fill the values and what makes up their master weights."""
    entry, dims, tensors = reader.entries[index], shard.dims, shard.tensors
    form = [part for part in MASTERS if part in tensors]
    saved = [part for part in MASTERS if reader.has(index, part)]
    if form == saved and entry.dtype == dtype_name(shard.param):
        reader.fill(index, VALUES, shard.offset, dims, shard.values)
        for part in form:
            reader.fill(index, part, shard.offset, dims, tensors[part])
        return
    master = reader.master(index, shard.offset, shard.numel, dims)
    if "remainder" in tensors:
        values, tensors["remainder"][:] = split_master(master.float())
    elif "remainder8" in tensors:
        nearest = torch.full_like(master, 0x80, dtype=torch.int32)
        values, tensors["remainder8"][:] = split8_master(master.float(), nearest)
    elif "master" in tensors:
        values = tensors["master"].copy_(master)
    else:
        values = master
    shard.values.copy_(values)


def _write_moments(reader: Reader, index: int, shard: ParamShard) -> None:
    """Fill the moments, from one format to another if they differ."""
    form, saved, dims = shard.form, reader.form(index), shard.dims
    maximum = form.names[2] in shard.tensors
    # Saved without AMSGrad: the largest so far is not known, the latest is a bound.
    without = maximum and not reader.has_maximum(index)
    ordered = same_order(reader.entries[index], dims)
    if saved is form and (ordered or not form.has_scales):
        parts, tensors = parts_of(form, True), form.tensors(maximum)
        for field, name in tensors.items():
            source = tensors[field.removeprefix("max_")] if without else name
            first = part_of(name, shard.offset, shard.offset + shard.numel).start
            reader.fill(index, parts[source], first, dims, shard.tensors[name])
        return
    for start, stop, moments in _converted(reader, index, shard):
        for name, values in moments.items():
            shard.tensors[name][part_of(name, start, stop)].copy_(values)


def _converted(
    reader: Reader, index: int, shard: ParamShard
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """The moments in the shard's format, with where in the shard they begin and end.

    Piece by piece, unless each would need the whole.
    """
    maximum = shard.form.names[2] in shard.tensors
    ordered = same_order(reader.entries[index], shard.dims)
    length = _CONVERTED_AT_ONCE if ordered else shard.numel
    for start in range(0, shard.numel, length):
        stop = min(start + length, shard.numel)
        moments = reader.moments(index, shard.offset + start, stop - start, shard.dims)
        if not maximum:
            moments.pop("max_exp_avg_sq", None)
        elif "max_exp_avg_sq" not in moments:
            moments["max_exp_avg_sq"] = moments["exp_avg_sq"]
        yield start, stop, encode(shard.form, moments, shard.values.dtype)


def check_moments(reader: Reader, index: int, shard: ParamShard) -> None:
    """See that the moments can be converted to the shard's format.

    Raises:
        CheckpointError: one has no code there.
    """
    try:
        for _ in _converted(reader, index, shard):
            pass
    except ValueError as error:
        raise CheckpointError(f"{reader.entries[index].name}: {error}") from error


def write_whole(reader: Reader, index: int, tensor: Tensor) -> None:
    """Fill a tensor that no optimizer updates."""
    entry = reader.entries[index]
    part = "extra" if entry.kind == "extra" else VALUES
    dims = dims_of(tensor)
    # Of another dtype, a 16-bit param's master weights are closer than its values.
    masters = entry.dtype != dtype_name(tensor) and any(reader.has(index, name) for name in MASTERS)
    if dims is None or tensor.is_conj() or tensor.is_neg() or masters:
        order = tuple(range(len(entry.shape)))
        if masters:
            values = reader.master(index, 0, entry.numel, order)
        else:
            values = reader.range(index, part, 0, entry.numel, order)
        pairs = [2] if tensor.is_complex() else []
        shaped = values.view([*entry.shape, *pairs])
        tensor.detach().copy_(torch.view_as_complex(shaped) if pairs else shaped)
    else:
        reader.fill(index, part, 0, dims, flat(tensor, dims))
