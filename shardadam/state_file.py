"""A file for state: reserved in advance, seen as tensors, gone with the process.

[Note: the state file]

The state in the file is reached in two ways, which the page cache keeps the same:

    zeros()           tensors that are a mapping of the file. For who reads or writes all state now
                      and then: `optimizer.state`, state dicts, checkpoints.
    read(), write()   copies between the file and memory. For the step: where the disk fails, they
                      raise OSError, while a page of a mapping that can't be read kills the process
                      (SIGBUS); and they take no memory but what they are given.

The file has no name (it is unlinked as soon as it has been opened), so that nobody else opens it
and nothing is left of it however the process ends. Its space is reserved before it is used, so that
a full disk is an error at construction and not in a step.
"""

import contextlib
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor


class StateFile:
    """The file of one optimizer and rank, a `StateMemory`; opened when first reserved.

    Args:
        directory: where; on the disk that is to hold the state.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = -1
        self._end = 0  # of what is reserved
        self._region: mmap.mmap | None = None
        self._region_start = self._used = 0
        self._offsets: dict[int, int] = {}  # in the file, of tensors by their addresses

    def where(self) -> str:
        """As in `StateMemory`."""
        return f"of this rank in a file in {self._directory}"

    def reserve(self, sizes: Sequence[int]) -> None:
        """As in `StateMemory`."""
        nbytes = sum(map(_whole_pages, sizes))
        if self._fd < 0:
            self._open()
        region = b"" if self._region is None else self._region
        if nbytes <= len(region) - self._used:
            return
        with self._named(f"{nbytes:,} bytes of state can't be reserved"):
            try:
                os.posix_fallocate(self._fd, self._end, nbytes)
            except OSError:
                os.ftruncate(self._fd, self._end)  # it may have got a part
                raise
        self._region = mmap.mmap(self._fd, nbytes, offset=self._end)
        self._region_start, self._used = self._end, 0
        self._end += nbytes

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """As in `StateMemory`; fresh space in a file is zero. Every tensor begins a page."""
        nbytes = numel * dtype.itemsize
        if not nbytes:
            return torch.zeros(0, dtype=dtype)
        self.reserve([nbytes])
        assert self._region is not None
        tensor = torch.frombuffer(self._region, dtype=dtype, count=numel, offset=self._used)
        self._offsets[tensor.data_ptr()] = self._region_start + self._used
        self._used += _whole_pages(nbytes)
        return tensor

    def offset(self, tensor: Tensor) -> int:
        """Where in the file a tensor of `zeros` begins, in bytes."""
        return self._offsets[tensor.data_ptr()] if tensor.numel() else 0

    def read(self, offset: int, memory: memoryview) -> None:
        """Fill ``memory`` with the bytes from ``offset`` on.

        Raises:
            OSError: they can't be read.
        """
        with self._named("state can't be read"):
            while memory:
                count = os.preadv(self._fd, [memory], offset)
                if not count:
                    raise OSError(errno.EIO, "the file was cut off")
                memory, offset = memory[count:], offset + count

    def write(self, offset: int, memory: memoryview) -> None:
        """Write ``memory`` to the bytes from ``offset`` on.

        Raises:
            OSError: they can't be written.
        """
        with self._named("state can't be written"):
            while memory:
                count = os.pwritev(self._fd, [memory], offset)
                memory, offset = memory[count:], offset + count

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Adds to the system's error what could not be done, and where."""
        try:
            yield
        except OSError as error:
            words = f"{what} in {self._directory}: {error.strerror}"
            raise OSError(error.errno, words) from error

    def _open(self) -> None:
        # Only for its owner, and neither an existing file nor a link: mkstemp sees to it.
        fd, name = tempfile.mkstemp(prefix="shardadam-state-", dir=self._directory)
        self._fd = fd
        weakref.finalize(self, os.close, fd)
        os.unlink(name)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
