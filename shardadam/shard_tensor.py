"""This rank's elements of a state tensor, as `state_dict()` shows them and checkpoints read them.

[Note: checkpoints]

torch.distributed.checkpoint asks a tensor for boxes of a global shape (`_Checkpointable`, a
protocol that it recognizes by three methods), writes those and reads them back in place. So a
`ShardTensor` has the shape of the param, and what reaches the disk is keyed by param, in the
param's own shape, whatever the world size and the buckets: what torch.optim's state looks like.

It is not a DTensor, which would be cut along a dim, and there is no arithmetic on it but what
compares two of them. ``torch.load(weights_only=True)`` takes it where shardadam is imported.

While the whole tensor is known on this rank (`consolidate_state_dict()`), that is what torch.save
writes: programs that save the state dict of one rank then save all of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardadam.boxes import Box, boxes_of

if TYPE_CHECKING:  # half a second that only those pay who write checkpoints
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

aten = torch.ops.aten
# What torch.testing.assert_close compares by: of the elements that are here, 1-D.
_ELEMENTWISE = (
    *(aten.eq.Tensor, aten.ne.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar),
    *(aten.abs.default, aten.isnan.default, aten.isfinite.default),
)
_OPTIONS = ("dtype", "device", "pin_memory")


@dataclass(frozen=True, slots=True)
class Extent:
    """Which elements of a tensor of ``shape`` a shard holds.

    Numbers ``first``, ``first + 1``, … in the order of memory, in which ``order`` are the dims of
    more than one element, from the outermost to the innermost. ``rank`` of ``world_size`` had it;
    that is for errors and does not count in comparisons.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    first: int
    numel: int
    rank: int
    world_size: int

    def same_elements(self, other: "Extent") -> bool:
        """Whether both are the same elements of the same shape in the same order."""
        if self.shape != other.shape or self.numel != other.numel:
            return False
        return not self.numel or (self.order, self.first) == (other.order, other.first)

    def boxes(self) -> list[Box]:
        """As boxes in ``shape``, see [Note: boxes]; an empty tensor is one empty box."""
        if not math.prod(self.shape):
            return [Box((0,) * len(self.shape), self.shape, 0)]
        sizes = [self.shape[dim] for dim in self.order]
        found = []
        for box in boxes_of(sizes, self.first, self.first + self.numel):
            offsets, lengths = [0] * len(self.shape), [1] * len(self.shape)
            for dim, offset, length in zip(self.order, box.offsets, box.sizes, strict=True):
                offsets[dim], lengths[dim] = offset, length
            found.append(Box(tuple(offsets), tuple(lengths), box.first))
        return found

    def strides(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        strides, stride = [1] * len(self.shape), 1
        for dim in reversed(self.order):
            strides[dim] = stride
            stride *= self.shape[dim]
        return tuple(strides)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Extent":
        return self

    def __str__(self) -> str:
        return f"elements {self.first} to {self.first + self.numel} of {self.shape}"


def extent_of(
    shape: Sequence[int], dims: Sequence[int], first: int, numel: int, rank: int, world_size: int
) -> Extent:
    """An `Extent` of a tensor whose memory has ``dims`` from the outermost to the innermost."""
    order = tuple(dim for dim in dims if shape[dim] != 1)
    return Extent(tuple(shape), order, first, numel, rank, world_size)


def nothing() -> None:
    """The whole tensor is not known."""


class ShardTensor(Tensor):
    """A tensor of which only some elements are here; see [Note: checkpoints].

    Attributes:
        local: the elements that are here, 1-D, in the order of memory.
        extent: which those are.
        whole: gives the whole tensor, on the host, or None where it is not known.
    """

    local: Tensor
    extent: Extent
    whole: Callable[[], Tensor | None]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, local: Tensor, extent: Extent, whole: Callable[[], Tensor | None] = nothing
    ) -> "ShardTensor":
        """A wrapper without memory of its own: its address is 0, as torch's stagers expect."""
        made: ShardTensor = Tensor._make_wrapper_subclass(
            cls, extent.shape, strides=extent.strides(), dtype=local.dtype, device=local.device
        )
        return made

    def __init__(
        self, local: Tensor, extent: Extent, whole: Callable[[], Tensor | None] = nothing
    ) -> None:
        self.local, self.extent, self.whole = local, extent, whole

    # ---- torch.distributed.checkpoint ------------------------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> "list[WriteItem]":
        """One item per box."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> "list[ChunkStorageMetadata]":
        """The boxes as the planner wants them."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            for box in self.extent.boxes()
        ]

    def __get_tensor_shard__(self, index: "MetadataIndex") -> Tensor:
        """A view of the box that begins at ``index.offset``."""
        for box in self.extent.boxes():
            if index.offset is None or tuple(index.offset) == box.offsets:
                start = self.local.storage_offset() + box.first - self.extent.first
                return self.local.as_strided(box.sizes, self.extent.strides(), start)
        raise ValueError(f"{index} is none of the boxes of {self}")

    # ---- what checkpoints do with tensors --------------------------------------------------------

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Copies, and no arithmetic: what it would be over all ranks is not known here."""
        first, *others = args
        options = {
            k: v for k, v in (kwargs or {}).items() if k in ("dtype", "device", "pin_memory")
        }
        if isinstance(first, ShardTensor):
            local, extent = first.local, first.extent
            if func in (aten.detach.default, aten.alias.default):
                return ShardTensor(local.detach(), extent, first.whole)
            if func is aten.clone.default:
                copied = local.clone()
                return ShardTensor(copied, extent, first._whole_for(copied))
            if func is aten._to_copy.default:
                copied = aten._to_copy.default(local, **options)
                converted = copied.dtype != local.dtype
                return ShardTensor(
                    copied, extent, nothing if converted else first._whole_for(copied)
                )
            if func in (aten.empty_like.default, aten.zeros_like.default):
                return ShardTensor(torch.zeros_like(local, **options), extent)
            if func is aten.new_empty.default and tuple(others[0]) == extent.shape:
                return ShardTensor(torch.empty_like(local, **options), extent)
            other = others[0] if others else None
            if func in _ELEMENTWISE and not isinstance(other, ShardTensor):
                return func(local, *others, **(kwargs or {}))
            if isinstance(other, ShardTensor):
                same = extent.same_elements(other.extent)
                if func is aten.equal.default:
                    return same and torch.equal(local, other.local)
                if func in _ELEMENTWISE and same:
                    return func(local, other.local, **(kwargs or {}))
                if func is aten.copy_.default and same:
                    local.copy_(other.local)
                    torch.autograd.graph.increment_version(local)  # not done in here
                    return first
        raise NotImplementedError(
            f"{func} on {next(arg for arg in args if isinstance(arg, ShardTensor))}: only a rank's "
            "elements are here. Use .local for those, consolidate_state_dict() for whole tensors"
        )

    def share_memory_(self) -> "ShardTensor":
        """For stagers that hand their copy to another process."""
        self.local.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardTensor":
        """A copy that shares no memory."""
        local = self.local.clone()
        copied = memo[id(self)] = ShardTensor(local, self.extent, self._whole_for(local))
        return copied

    def _whole_for(self, copied: Tensor) -> Callable[[], Tensor | None]:
        """What `whole` gives a copy: the same, until that is written to."""
        whole, version = self.whole(), copied._version
        return lambda: whole if copied._version == version else None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A tensor and numbers: see [Note: checkpoints]."""
        whole = self.whole()
        if whole is not None:
            return whole.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
        extent = self.extent
        numbers = (extent.shape, extent.order, extent.first, extent.rank, extent.world_size)
        return restored, (self.local, *numbers)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardTensor({self.extent}, {self.dtype})"


def _to_a_process(tensor: ShardTensor) -> Any:
    """Where no file is written it stays what it is: `async_save` may save in another process."""
    return ShardTensor, (tensor.local, tensor.extent)


ForkingPickler.register(ShardTensor, _to_a_process)


def restored(
    local: Tensor,
    shape: Sequence[int],
    order: Sequence[int],
    first: int,
    rank: int,
    world_size: int,
) -> ShardTensor:
    """A `ShardTensor` as it was before it was written to a file."""
    extent = Extent(tuple(shape), tuple(order), first, local.numel(), rank, world_size)
    return ShardTensor(local, extent)


torch.serialization.add_safe_globals([restored])
