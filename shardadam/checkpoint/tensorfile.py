"""One rank's tensors in a safetensors file: written, and read back with every byte accounted for.

The format is eight bytes, a JSON header and the data, so it is written and read here, with plain
writes and reads: each block is digested while the cache still has it, a full disk or a bad sector
is an OSError (reading mapped memory, it would be a SIGBUS), and no file is ever in memory whole.
"""

import ctypes
import os
import stat
from collections.abc import Callable, Iterable

import xxhash
from torch import Tensor

from shardadam.checkpoint.errors import CheckpointError

BLOCK = 2**20
"""Bytes written, read or digested at once: they fit a cache."""

Progress = Callable[[int], object]
"""Told of every block's bytes."""


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor; valid while the tensor is."""
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    if not tensor.numel():
        return memoryview(b"")
    array = (ctypes.c_char * (tensor.numel() * tensor.itemsize)).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def write(
    folder: int, name: str, header: bytes, tensors: Iterable[Tensor], progress: Progress
) -> list[str]:
    """Write a new file into the folder with descriptor ``folder`` and sync it.

    Returns:
        The digest of every tensor.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, 0o666, dir_fd=folder)
    try:
        write_all(file, memoryview(header))
        digests = []
        for tensor in tensors:
            # One by one: of tensors on a GPU only one is copied at a time.
            host = tensor.detach().cpu().contiguous()
            digest = xxhash.xxh3_128()
            data = memory(host)
            for start in range(0, len(data), BLOCK):
                block = data[start : start + BLOCK]
                digest.update(block)
                write_all(file, block)
                progress(len(block))
            digests.append(digest.hexdigest())
        os.fsync(file)
    finally:
        os.close(file)
    return digests


def write_all(file: int, data: memoryview) -> None:
    """Write all of ``data``."""
    while len(data):
        data = data[os.write(file, data) :]


def open_file(folder: int, name: str, where: str) -> tuple[int, int]:
    """Open a regular file, no link: its descriptor and its size.

    Raises:
        CheckpointError: there is none.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        file = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        raise CheckpointError(f"{where}: expected a file, found: {error.strerror}") from error
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        os.close(file)
        raise CheckpointError(f"{where}: expected a regular file")
    return file, found.st_size


def read_all(file: int, position: int, data: memoryview, where: str) -> None:
    """Fill ``data`` from the file's bytes at ``position``.

    Raises:
        CheckpointError: the file ends before, or can't be read.
    """
    while len(data):
        try:
            count = os.preadv(file, [data], position)
        except OSError as error:
            raise CheckpointError(f"{where}: reading failed: {error}") from error
        if not count:
            raise CheckpointError(f"{where}: expected bytes at {position}, found the file's end")
        data, position = data[count:], position + count


def check_header(file: int, size: int, header: bytes, end: int, where: str) -> None:
    """Compare a file's size and first bytes with what they have to be.

    Raises:
        CheckpointError: they differ.
    """
    if size != end:
        raise CheckpointError(f"{where}: expected {end} bytes, found {size}")
    found = bytearray(len(header))
    read_all(file, 0, memoryview(found), where)
    if found != header:
        first = next(i for i, (a, b) in enumerate(zip(header, found, strict=True)) if a != b)
        raise CheckpointError(
            f"{where}: its header is not the one of this checkpoint: from byte {first} expected "
            f"{header[first : first + 40]!r}, found {bytes(found[first : first + 40])!r}"
        )


def digest_of(file: int, start: int, end: int, where: str, progress: Progress) -> str:
    """The digest of a file's bytes ``[start, end)``."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(BLOCK, end - start)))
    while start < end:
        block = buffer[: end - start]
        read_all(file, start, block, where)
        digest.update(block)
        progress(len(block))
        start += len(block)
    return digest.hexdigest()


def write_file(folder: int, name: str, data: bytes) -> None:
    """Write a new file into the folder and sync it."""
    write(folder, name, data, (), lambda _: None)
