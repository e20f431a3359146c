"""One param's entry of a state dict, and what of it this rank's bucket is to hold."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardadam import dtensors
from shardadam.buffers import FlatBucket
from shardadam.collectives import Communicator
from shardadam.kernels.run import in_memory_order
from shardadam.kernels.state_formats import (
    FORMATS,
    MASTERS,
    MOMENTS,
    StateFormat,
    decode,
    decode_elements,
    encode,
    format_of,
    is_scale,
    master_between,
    part_of,
    per_block,
    per_element,
)
from shardadam.shard_tensor import Extent, ShardTensor, extent_of
from shardadam.shards import ParamShard, shard_of

Write = Callable[[], object]


def extent(shard: ParamShard, name: str, communicator: Communicator) -> Extent:
    """Which elements of the tensor ``name`` of a param a rank has."""
    ranks = communicator.rank, communicator.world_size
    if is_scale(name):
        part = part_of(name, shard.offset, shard.offset + shard.numel)
        blocks = part_of(name, 0, shard.param.numel()).stop
        return extent_of((blocks,), (0,), part.start, part.stop - part.start, *ranks)
    reals = 2 if shard.param.is_complex() else 1
    first, numel = shard.offset // reals, shard.numel // reals
    return extent_of(shard.param.shape, shard.dims, first, numel, *ranks)


class EntryReader:
    """Reads one param's entry; nothing is written before its writes are called.

    ``views``: what ``optimizer.state`` shows, where that is read: tensors of their shapes are this
    rank's elements.
    """

    def __init__(
        self,
        bucket: FlatBucket,
        index: int,
        communicator: Communicator,
        views: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._bucket = bucket
        self._index = index
        self._communicator = communicator
        self._views = views
        self._piece = bucket.pieces[index]
        self._name = bucket.names[index]
        self._shard = shard_of(bucket, index)
        self._whole = self._piece.numel == bucket.bucket.spans[index].numel

    def scalars(self, entry: Mapping[str, Any]) -> list[Write]:
        """Writes for "step" and its like; older torch versions saved floats."""
        return [
            partial(values[self._index].fill_, float(entry.get(name, values.new_tensor(initial))))
            for name, values in self._bucket.scalars.items()
            for initial in (self._bucket.initial_scalars[name],)
        ]

    def tensors(self, entry: Mapping[str, Any], amsgrad: bool) -> list[Write]:
        """Writes for the sharded tensors.

        Raises:
            ValueError: one is missing or does not fit; names the param.
        """
        values = {**self._moments(entry, amsgrad), **self._master(entry)}
        return [partial(self._write, name, value) for name, value in values.items()]

    def edits(self, entry: Mapping[str, Any]) -> dict[str, Write]:
        """Writes for what is no longer one of the views, by name; raises as `tensors`."""
        views = self._views
        assert views is not None
        edits: dict[str, Write] = {}
        if not entry:
            edits.update(zip(self._bucket.scalars, self.scalars({}), strict=True))
        else:
            for name in self._bucket.scalars:
                if entry.get(name) is not views[name]:
                    edits[name] = self._scalar_edit(name, entry)
            self._check_beside(entry, views)
        values = {**self._moments(entry, False), **self._master(entry)}
        for name, value in values.items():
            shown = self._shown(name)
            if shown not in views or entry.get(shown) is not views[shown]:
                # What was put there may be a view of what another write changes.
                edits[name] = partial(self._write, name, None if value is None else value.clone())
        return edits

    def _check_beside(self, entry: Mapping[str, Any], views: Mapping[str, Tensor]) -> None:
        """Raise ValueError for moments that were put beside codes, which would be read first."""
        form = self._bucket.form
        codes = [self._shown(name) for name in form.tensors(False).values()]
        put = [name for name in MOMENTS if name in entry and name not in views]
        if form.has_scales and put and all(entry.get(code) is views[code] for code in codes):
            raise ValueError(
                f"{self._name}: {put[0]!r} was put into optimizer.state beside {codes[0]!r}, which "
                "says the same in codes: expected exp_avg and exp_avg_sq in the place of all codes"
            )

    def _scalar_edit(self, name: str, entry: Mapping[str, Any]) -> Write:
        value = entry.get(name)
        if not isinstance(value, float | int) and not (
            isinstance(value, Tensor) and value.numel() == 1
        ):
            found = "nothing" if value is None else type(value).__name__
            raise ValueError(f"{self._name}: expected a number for {name!r}, found {found}")
        return partial(self._bucket.scalars[name][self._index].fill_, float(value))

    # ---- moments --------------------------------------------------------------------------------

    def _moments(self, entry: Mapping[str, Any], amsgrad: bool) -> dict[str, Tensor | None]:
        """This rank's part of the moments' tensors, in the bucket's format; None for zeros."""
        form = self._bucket.form
        in_entry = any(self._shown(f.names[2]) in entry for f in FORMATS.values())
        maximum = amsgrad or self._bucket.has_maximum or in_entry
        if not entry:
            return dict.fromkeys(form.tensors(maximum).values())
        saved = self._format(entry)
        names = saved.tensors(saved.names[2] in entry)
        stored = {name: self._stored(saved, name, entry) for name in names.values()}
        if maximum:
            # Saved without AMSGrad: the largest so far is not known, the latest is a bound.
            for field, name in saved.tensors(True).items():
                stored.setdefault(name, stored[names[field.removeprefix("max_")]])
        if saved.has_scales and not self._bucket.exchanged:
            stored, saved = self._in_blocks(stored, saved)
        alike = saved.names == form.names and (
            form.dtypes is None
            or all(form.dtype(n, self._bucket.dtype) == t.dtype for n, t in stored.items())
        )
        if alike:
            return {name: stored[name] for name in form.tensors(maximum).values()}
        try:
            encoded = encode(form, decode(saved, stored), self._bucket.dtype)
        except ValueError as error:
            raise ValueError(f"{self._name}: {error}") from None
        return {name: encoded[name] for name in form.tensors(maximum).values()}

    def _in_blocks(
        self, stored: dict[str, Tensor], saved: StateFormat
    ) -> tuple[dict[str, Tensor], StateFormat]:
        """A DTensor's codes, whose scales are per element, in this rank's blocks.

        Where blocks were others, because it was distributed otherwise: the moments.
        """
        scales = {name: per_block(stored[name]) for name in stored if is_scale(name)}
        whole = {name: scale for name, scale in scales.items() if scale is not None}
        if len(whole) == len(scales):
            return {**stored, **whole}, saved
        return decode_elements(saved, stored), FORMATS["fp32"]

    def _format(self, entry: Mapping[str, Any]) -> StateFormat:
        """The format that is in ``entry``: the bucket's, if that is there among others."""
        form, param = self._bucket.form, self._bucket.dtype
        names = {
            name
            for known in FORMATS.values()
            for name in known.tensors(True).values()
            if self._shown(name) in entry
            # Codes of another dtype: torch.optim has had them, as in `_is_stale`.
            and (
                not known.has_scales
                or not isinstance(value := entry[self._shown(name)], Tensor)
                or value.dtype == known.dtype(name, param)
            )
        }
        own = form.tensors(False).values()
        fits = names.issuperset(own) and not any(self._of_plain(n, entry) for n in own)
        saved = form if fits else format_of(names)
        if saved is not None:
            return saved
        scale = FORMATS["q16"].tensors(False)["exp_avg_scale"]
        scales = {key for key in entry if str(key).partition("@")[0] == scale}
        if scales - {self._shown(scale)}:
            raise ValueError(
                f"{self._name}: its moments are coded in blocks of another order of memory "
                "(channels_last, transposed): expected the strides that it was saved with. What "
                "consolidate_state_dict() returns, and checkpoints of shardadam.checkpoint, fit any"
            )
        raise self._lacks(next(name for name in form.tensors(False).values() if name not in names))

    def _of_plain(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Whether it is a scale of a plain param's blocks, which a DTensor's are not."""
        value = entry[self._shown(name)]
        here = self._bucket.exchanged or self._views is not None or dtensors.is_dtensor(value)
        shape = self._bucket.params[self._index].shape
        return is_scale(name) and not here and getattr(value, "shape", None) != shape

    def _stored(self, saved: StateFormat, name: str, entry: Mapping[str, Any]) -> Tensor:
        """This rank's elements of the tensor ``name`` of format ``saved``."""
        shown = self._shown(name)
        if shown not in entry:
            raise self._lacks(name)
        own, dtype = self._own(name, entry[shown]), saved.dtype(name, self._bucket.dtype)
        if saved.has_scales and own.dtype != dtype:
            raise ValueError(f"{self._name}: expected {name} in {dtype}, found {own.dtype}")
        return own

    def _lacks(self, name: str) -> ValueError:
        where = "the state dict" if self._views is None else "optimizer.state"
        return ValueError(f"{self._name}: {where} has no {name!r} for it")

    # ---- master weights -------------------------------------------------------------------------

    def _master(self, entry: Mapping[str, Any]) -> dict[str, Tensor | None]:
        """This rank's part of what makes up the master weights; None for zeros."""
        wanted = self._bucket.master
        if wanted is None:
            return {}
        forms = (wanted, *MASTERS) if self._bucket.dtype == torch.bfloat16 else (wanted,)
        given = [name for name in forms if name in entry]
        given = [name for name in given if not self._is_stale(name, entry[name])]
        param = self._bucket.shard_piece(self._index)
        if not given:
            return {wanted: param if wanted == "master" else None}
        value = self._own(given[0], entry[given[0]])
        return {
            wanted: value
            if given[0] == wanted
            else master_between(param.to(value.device), value, wanted)
        }

    def _is_stale(self, name: str, value: Any) -> bool:
        """Whether torch.optim has had it, which casts what it loads and does not update it."""
        return isinstance(value, Tensor) and value.dtype != MASTERS[name]

    # ---- tensors --------------------------------------------------------------------------------

    def _shown(self, name: str) -> str:
        return self._bucket.shown_name(self._index, name)

    def _write(self, name: str, value: Tensor | None) -> None:
        if name not in self._bucket.state:
            self._bucket.add_maximum()
        target = self._bucket.owned_state(self._index)[name]
        target.zero_() if value is None else target.copy_(value)

    def _own(self, name: str, value: Any) -> Tensor:
        """This rank's elements of a saved tensor, whether full or already sharded."""
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{self._name}: expected a tensor for {name!r}, found {type(value).__name__}"
            )
        if not self._bucket.exchanged:
            return self._own_local(name, value)
        here = extent(self._shard, name, self._communicator)
        if isinstance(value, ShardTensor):
            return self._own_shard(name, value, here)
        if hasattr(value, "device_mesh"):
            raise ValueError(
                f"{self._name}: {name} is a DTensor; expected its full_tensor(), or a checkpoint "
                "that torch.distributed.checkpoint loads into this optimizer"
            )
        if self._views is not None and not self._whole and value.shape == (here.numel,):
            return value
        if value.shape != here.shape:
            raise ValueError(
                f"{self._name}: expected {name} of shape {here.shape}, found {tuple(value.shape)}"
            )
        if is_scale(name):
            return value[here.first : here.first + here.numel]
        return in_memory_order(self._bucket.piece_of(self._piece, value))

    def _own_local(self, name: str, value: Any) -> Tensor:
        """The elements that this rank has of a DTensor; its scales per element."""
        param = self._bucket.params[self._index]
        if self._views is not None and is_scale(name) and not dtensors.is_dtensor(value):
            shown = self._views.get(self._shown(name))
            if shown is not None and value.shape == shown.shape:
                return per_element(value, self._piece.numel)
        if value.shape != param.shape:
            raise ValueError(
                f"{self._name}: expected {name} of shape {tuple(param.shape)}, found "
                f"{tuple(value.shape)}"
            )
        if not dtensors.is_dtensor(value):
            local = dtensors.local_part(param, value)
        elif dtensors.same_placement(value, param):
            local = dtensors.local_of(value)
        else:
            raise ValueError(
                f"{self._name}: expected {name} distributed like the param, "
                f"{dtensors.describe(param)}; found {dtensors.describe(value)}. "
                "torch.distributed.checkpoint loads any, as does every rank a full tensor"
            )
        return in_memory_order(self._bucket.piece_of(self._piece, local))

    def _own_shard(self, name: str, value: ShardTensor, here: Extent) -> Tensor:
        saved = value.extent
        if not saved.same_elements(here):
            raise ValueError(
                f"{self._name}: {name} was saved by rank {saved.rank} of {saved.world_size} as "
                f"{saved}; this is rank {here.rank} of {here.world_size} and owns {here}. Expected "
                "the same layout; torch.distributed.checkpoint reads any, as does every rank what "
                "consolidate_state_dict() returns"
            )
        local = value.local
        return torch.view_as_real(local).flatten() if local.is_complex() else local
