"""Params: what they are to a kernel, and the memory that it updates.

That memory is a bucket's flat buffer, of which params are made views; or, for DTensors, where they
are already: their owner (FSDP2, tensor parallelism) has views of it of its own.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor

from shardadam import dtensors
from shardadam.kernels.run import in_memory_order
from shardadam.layout import ALIGNMENT, Bucket

_address = torch._C.TensorBase.data_ptr
_dtype = attrgetter("dtype")
_local = attrgetter("_local_tensor")


def real_dtype(param: Tensor) -> torch.dtype:
    """The dtype of ``param``'s elements in memory: complex ones are pairs of reals."""
    return param.dtype.to_real() if param.is_complex() else param.dtype


def real_numel(param: Tensor) -> int:
    """The number of ``param``'s elements in memory."""
    return param.numel() * (2 if param.is_complex() else 1)


def view_like(param: Tensor, flat: Tensor) -> Tensor:
    """``flat`` seen with the shape of ``param``, and its strides if those are dense.

    Complex where the param is; so keeps channels_last and transposed params as they are. Params
    that are not dense (slices, expanded ones) become contiguous.
    """
    if param.is_complex():
        flat = torch.view_as_complex(flat.view(flat.numel() // 2, 2))
    strides = torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()
    return flat.as_strided(param.shape, strides)


def order_name(tensor: Tensor) -> str:
    """The order of the dims of more than one element in memory; "" where it is row-major."""
    dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] != 1]
    order = sorted(dims, key=tensor.stride, reverse=True)
    return "" if order == dims or not tensor.numel() else f"@{'-'.join(map(str, order))}"


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a range of memory, each once."""
    like = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    return not tensor.numel() or all(own == kept for size, own, kept in strides if size != 1)


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device in a few words, for errors; of a DTensor also where its parts are."""
    words = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}".replace("torch.", "")
    return f"{words}, {dtensors.describe(tensor)}" if dtensors.is_dtensor(tensor) else words


class Params(Protocol):
    """The params of a bucket's spans, in memory.

    ``views``: what this rank has of each, all elements or its own. ``flat``: all ranks' shards,
    empty where they are not ``exchanged``.
    """

    params: list[Tensor]
    names: list[str]
    views: list[Tensor]
    flat: Tensor
    exchanged: bool

    def owned(self, part: slice, index: int) -> Tensor:
        """The elements ``part`` of this rank's shard, from span ``index`` on, 1-D."""

    def refresh(self) -> bool:
        """Whether views have changed, because params are elsewhere now.

        Raises:
            ValueError: they are where they can't be updated; names the param.
        """

    def first_block(self, index: int, number: int) -> int:
        """The number of the first block of this rank's view of span ``index``, for random bits.

        ``number``: of the param's own first block.
        """

    def shown(self, index: int, state: Tensor) -> Tensor:
        """``state``, shaped like the view of span ``index``, as the user sees it."""


class FlatParams:
    """Params of a flat buffer, whose ``.data`` is made a view of it."""

    exchanged = True

    def __init__(
        self,
        bucket: Bucket,
        params: Sequence[Tensor],
        names: Sequence[str],
        shard: int,
        dtype: torch.dtype,
    ) -> None:
        self.params, self.names = list(params), list(names)
        self.flat = torch.zeros(bucket.numel, dtype=dtype, device=params[0].device)
        self._shard = self.flat.view(bucket.shards, bucket.shard_numel)[shard]
        self.views = [
            view_like(param, self.flat[span.offset : span.offset + span.numel])
            for span, param in zip(bucket.spans, params, strict=True)
        ]
        for param, view in zip(params, self.views, strict=True):
            view.copy_(param)
            param.data = view
        self._addresses = list(map(_address, self.views))
        self._dtypes = list(map(_dtype, self.views))

    def owned(self, part: slice, index: int) -> Tensor:
        """As in `Params`."""
        return self._shard[part]

    def refresh(self) -> bool:
        """As in `Params`."""
        addresses, dtypes = list(map(_address, self.params)), list(map(_dtype, self.params))
        if addresses == self._addresses and dtypes == self._dtypes:
            return False
        for index, name in enumerate(self.names):
            made = self._addresses[index], self._dtypes[index]
            if made != (addresses[index], dtypes[index]):
                raise ValueError(
                    f"{name} no longer is the memory that the optimizer updates; its "
                    ".data was replaced after construction, by .to(), a wrapper, an assignment. "
                    "Expected: move and wrap the model first, then the optimizer; in DeepSpeed, "
                    "the optimizer of shardadam.integrations.deepspeed"
                )
        return False

    def first_block(self, index: int, number: int) -> int:
        """As in `Params`."""
        return number

    def shown(self, index: int, state: Tensor) -> Tensor:
        """As in `Params`."""
        return state


class DistributedParams:
    """DTensors, updated where they are.

    Their owner may replace a local tensor by another of the same values, as FSDP2 does when a model
    is loaded: it is found again at every step, as torch.optim does.
    """

    exchanged = False

    def __init__(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        self.params, self.names = list(params), list(names)
        self.views = list(map(_local, params))
        self.flat = self.views[0].new_empty(0)
        self._kinds = [_kind(view) for view in self.views]
        self._addresses = list(map(_address, self.views))

    def owned(self, part: slice, index: int) -> Tensor:
        """As in `Params`; of one span."""
        view = self.views[index]
        return in_memory_order(torch.view_as_real(view) if view.is_complex() else view)

    def refresh(self) -> bool:
        """As in `Params`."""
        views = list(map(_local, self.params))
        addresses = list(map(_address, views))
        if addresses == self._addresses:
            return False
        for name, view, kind in zip(self.names, views, self._kinds, strict=True):
            if _kind(view) != kind:
                raise ValueError(
                    f"the local tensor of {name} is not what it was at construction: expected "
                    f"{kind}, found {_kind(view)}. Expected: distribute the model first, then make "
                    "the optimizer"
                )
        self.views, self._addresses = views, addresses
        return True

    def first_block(self, index: int, number: int) -> int:
        """As in `Params`: replicas draw the same bits, and shards others."""
        at = dtensors.shard_number(self.params[index])
        return number + at * -(-real_numel(self.views[index]) // ALIGNMENT)

    def shown(self, index: int, state: Tensor) -> Tensor:
        """As in `Params`: distributed like the param."""
        shown: Tensor = dtensors.like(self.params[index], state)
        return shown


def _kind(tensor: Tensor) -> str:
    return f"{describe(tensor)} with strides {tensor.stride()}"
