"""Any range of a saved tensor, wherever its ranks have cut it and however it lay in memory."""

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.checkpoint import tensorfile
from shardadam.checkpoint.manifest import Entry
from shardadam.checkpoint.parts import VALUES, parts_of, saved_format
from shardadam.checkpoint.verifying import Opened
from shardadam.kernels.reference import join8_master, join_master
from shardadam.kernels.state_formats import (
    FORMATS,
    MASTER_BITS,
    StateFormat,
    decode,
    is_scale,
    part_of,
)


@dataclass(frozen=True, slots=True)
class _Place:
    """A shard of a part: where it begins among the elements, and in which file it is."""

    offset: int
    numel: int
    rank: int
    position: int


class Reader:
    """Reads parts of entries from an opened checkpoint."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self.entries = opened.manifest.entries
        self.world_size = len(opened.manifest.files)
        self._places: dict[tuple[int, str], list[_Place]] = defaultdict(list)
        self._parts: dict[int, set[str]] = defaultdict(set)
        for rank, shards in enumerate(opened.manifest.files):
            _, starts = opened.manifest.layout(rank)
            for shard, start in zip(shards, starts, strict=False):
                place = _Place(shard.offset, shard.numel, rank, start)
                self._places[shard.entry, shard.part].append(place)
                self._parts[shard.entry].add(shard.part)
        for places in self._places.values():
            places.sort(key=lambda place: place.offset)

    def has(self, index: int, part: str) -> bool:
        """Whether the entry was saved with that part."""
        return not self.entries[index].numel or (index, part) in self._places

    def form(self, index: int) -> StateFormat:
        """The format of the entry's moments; of an empty one, any."""
        return saved_format(self._parts[index]) or FORMATS["fp32"]

    def master_bits(self, index: int) -> int:
        """Of the most exact values that were saved."""
        own = self.entries[index].file_dtype(VALUES)[1].itemsize * 8
        return max([own, *(bits for part, bits in MASTER_BITS.items() if self.has(index, part))])

    def has_maximum(self, index: int) -> bool:
        """Whether the entry was saved with AMSGrad's maximum, and is not empty."""
        form = self.form(index)
        return (index, parts_of(form, True)[form.names[2]]) in self._places

    def open(self, index: int) -> None:
        """Open the files with the parts of an entry, so that reading them can't fail for names.

        Raises:
            CheckpointError: a file is missing, or another one.
        """
        for part in self._parts[index]:
            for place in self._places[index, part]:
                self._opened.file(place.rank)

    def fill(self, index: int, part: str, offset: int, dims: tuple[int, ...], to: Tensor) -> None:
        """Fill ``to``, 1-D, with the elements from ``offset`` on in the order of ``dims``.

        On the host, in the dtype that was saved, nothing but ``to`` is needed; else a copy of it;
        where the dims differ, the entry's whole part.
        """
        entry = self.entries[index]
        _, dtype = entry.file_dtype(part)
        if not is_scale(part) and not same_order(entry, dims):
            whole = torch.empty(entry.numel, dtype=dtype)
            self._read(index, part, 0, whole)
            to.copy_(_reorder(entry, whole, dims)[offset : offset + to.numel()])
        elif to.device.type == "cpu" and to.dtype == dtype and to.is_contiguous():
            self._read(index, part, offset, to)
        else:
            copy = torch.empty(to.numel(), dtype=dtype)
            self._read(index, part, offset, copy)
            to.copy_(copy)

    def range(
        self, index: int, part: str, offset: int, numel: int, dims: tuple[int, ...]
    ) -> Tensor:
        """The same elements in a new tensor on the host, in the dtype that was saved."""
        values = torch.empty(numel, dtype=self.entries[index].file_dtype(part)[1])
        self.fill(index, part, offset, dims, values)
        return values

    def master(self, index: int, offset: int, numel: int, dims: tuple[int, ...]) -> Tensor:
        """The most exact values that were saved: fp32 masters of 16-bit params."""
        values = self.range(index, VALUES, offset, numel, dims)
        for part, join in (("remainder", join_master), ("remainder8", join8_master)):
            if self.has(index, part) and values.dtype == torch.bfloat16:
                return join(values, self.range(index, part, offset, numel, dims))
        if self.has(index, "master") and numel:
            master = self.range(index, "master", offset, numel, dims)
            # Where somebody wrote the param since the last step, the param is right.
            rounded = master.to(values.dtype).view(torch.int16)
            return torch.where(rounded == values.view(torch.int16), master, values.float())
        return values

    def moments(
        self, index: int, offset: int, numel: int, dims: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """The moments of those elements, decoded; ``offset``: a block's first element.

        Where the dims differ, the entry's whole moments are decoded for it.
        """
        entry, form = self.entries[index], self.form(index)
        parts = parts_of(form, self.has_maximum(index))
        if form.has_scales and not same_order(entry, dims):
            whole = self.moments(index, 0, entry.numel, entry.dims)
            return {
                name: _reorder(entry, values, dims)[offset : offset + numel]
                for name, values in whole.items()
            }
        stored = {}
        for name, part in parts.items():
            range_ = part_of(name, offset, offset + numel)
            stored[name] = self.range(index, part, range_.start, range_.stop - range_.start, dims)
        return decode(form, stored)

    def _read(self, index: int, part: str, offset: int, to: Tensor) -> None:
        places = self._places[index, part]
        if not to.numel():
            return
        # A byte that is neither 0 nor 1 is no bool.
        raw = to.view(torch.uint8) if to.dtype == torch.bool else to
        data, itemsize = tensorfile.memory(raw), to.itemsize
        number = bisect_right(places, offset, key=lambda place: place.offset) - 1
        done = 0
        while done < to.numel():
            place = places[number]
            skip = offset + done - place.offset
            count = min(place.numel - skip, to.numel() - done)
            file, _ = self._opened.file(place.rank)
            tensorfile.read_all(
                file,
                place.position + skip * itemsize,
                data[done * itemsize : (done + count) * itemsize],
                self._opened.where(place.rank),
            )
            done += count
            number += 1
        if to.dtype == torch.bool:
            raw.clamp_(max=1)


def same_order(entry: Entry, dims: tuple[int, ...]) -> bool:
    """Whether the entry's elements were saved in the order of ``dims``."""

    def order(dims: tuple[int, ...]) -> list[int]:
        return [dim for dim in dims if entry.shape[dim] != 1]

    return not entry.numel or order(entry.dims) == order(dims)


def _reorder(entry: Entry, whole: Tensor, dims: tuple[int, ...]) -> Tensor:
    """All elements, saved in the order of the entry's dims, in the order of ``dims``."""
    pairs = [2] if entry.dtype.startswith("complex") else []
    shaped = whole.view([entry.shape[dim] for dim in entry.dims] + pairs)
    order = [entry.dims.index(dim) for dim in dims] + [len(dims)] * len(pairs)
    return shaped.permute(order).reshape(-1)
