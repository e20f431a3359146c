"""How and where the state of buckets is stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shardadam.kernels.state_formats import MASTERS, StateFormat, part_of


class StateMemory(Protocol):
    """What state is allocated in."""

    def reserve(self, sizes: Sequence[int]) -> None:
        """Make sure that tensors of ``sizes`` bytes can be allocated next.

        Raises:
            OSError: there is no room; nothing has been allocated.
        """

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Allocate a 1-D tensor of zeros."""

    def where(self) -> str:
        """Where that is, for the user."""


class DeviceMemory:
    """The memory of a device, which needs no reserving."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reserve(self, sizes: Sequence[int]) -> None:
        """Nothing: an allocator says itself that it has no more."""

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """As in `StateMemory`."""
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def where(self) -> str:
        """As in `StateMemory`."""
        return "on this rank"


class PinnedMemory:
    """The host's memory, from and to which a GPU copies by itself."""

    def reserve(self, sizes: Sequence[int]) -> None:
        """Nothing, as `DeviceMemory`."""

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """As in `StateMemory`."""
        return torch.zeros(numel, dtype=dtype, pin_memory=True)

    def where(self) -> str:
        """As in `StateMemory`."""
        return "in this rank's host memory"


_OPTIONS = {"master": "fp32", "remainder": "split", "remainder8": "split8"}


@dataclass(frozen=True, slots=True)
class Storage:
    """How and where a bucket's state is stored, and where its random bits come from.

    ``dtype``: of the params. ``form``: of the moments. ``master``: one of `MASTERS`; None where the
    param is all there is. ``amsgrad``: whether there is a maximum from the start. ``seed``: see
    `kernels.random_bits`.
    """

    dtype: torch.dtype
    form: StateFormat
    master: str | None
    amsgrad: bool
    seed: int
    memory: StateMemory

    def tensors(self, amsgrad: bool) -> dict[str, torch.dtype]:
        """The names and dtypes of the state's tensors."""
        names = self.form.tensors(amsgrad).values()
        moments = {name: self.form.dtype(name, self.dtype) for name in names}
        return moments if self.master is None else {**moments, self.master: MASTERS[self.master]}

    def describe(self) -> str:
        """What is stored, for the user; masters by the name of the option."""
        moments = "fp64" if self.dtype == torch.float64 else self.form.name
        master = "" if self.master is None else f" and master={_OPTIONS[self.master]!r}"
        return f"{str(self.dtype).removeprefix('torch.')} params with {moments} moments{master}"

    @staticmethod
    def sizes(tensors: Mapping[str, torch.dtype], numel: int) -> list[int]:
        """The bytes of each of ``tensors``, for ``numel`` elements."""
        return [part_of(name, 0, numel).stop * own.itemsize for name, own in tensors.items()]

    @property
    def draws(self) -> bool:
        """Whether params are updated with random bits."""
        whole = self.dtype != torch.bfloat16 or self.master in ("master", "remainder")
        return self.form.dtypes is not None or not whole
