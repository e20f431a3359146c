"""Is a checkpoint whole? Every digest of it, in parallel."""

import os
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from shardadam.checkpoint import folders, manifest, tensorfile
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.manifest import Manifest
from shardadam.checkpoint.progress import Bar

_LISTED = 20  # damaged tensors of one checkpoint


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found: folders that are whole, and those that are not, with the reasons.

    ``broken`` has an entry for each damaged file or tensor, and after 20 of a folder one that says
    how many more there are.
    """

    whole: list[Path]
    broken: list[tuple[Path, str]]


def verify(directory: str | Path, *, threads: int | None = None) -> Verified:
    """Check every byte of a checkpoint, or of all checkpoints in a directory. Not collective.

    Args:
        directory: a ``step-…`` folder, or the directory of several.
        threads: how many read and digest at once; None: as many as this process may use, up to 8.
    """
    directory = Path(directory)
    paths = [candidate.path for candidate in folders.candidates(directory)]
    if not paths:
        paths = [directory]
    found = Verified([], [])
    for path in paths:
        try:
            with Opened(path) as opened:
                damage = list(opened.damage(range(len(opened.manifest.files)), 0, threads))
            found.broken.extend((path, reason) for reason in damage[:_LISTED])
            if len(damage) > _LISTED:
                found.broken.append((path, f"and {len(damage) - _LISTED} more"))
            if not damage:
                found.whole.append(path)
        except CheckpointError as error:
            found.broken.append((path, str(error)))
    return found


def _processors() -> int:
    """That this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def is_complete(path: Path) -> bool:
    """Whether the manifest is good and all files have their sizes and headers."""
    try:
        with Opened(path) as opened:
            for rank in range(len(opened.manifest.files)):
                opened.file(rank)
    except CheckpointError:
        return False
    return True


class Opened:
    """A checkpoint's folder, its manifest, and its files, opened and checked as they are needed.

    What is open can be read to its end, also when somebody deletes the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = folders.open_folder(path)
        self._files: dict[int, tuple[int, list[int]]] = {}
        try:
            where = f"{path}/{manifest.FILE}"
            file, size = tensorfile.open_file(self._folder, manifest.FILE, where)
            try:
                if size > manifest.MAX_BYTES:
                    raise CheckpointError(
                        f"{where}: expected up to {manifest.MAX_BYTES} bytes, found {size}"
                    )
                text = bytearray(size)
                tensorfile.read_all(file, 0, memoryview(text), where)
            finally:
                os.close(file)
            self.manifest: Manifest = manifest.read(bytes(text), where)
            step = folders.step_of(path.name)
            if step not in (None, self.manifest.step):
                raise CheckpointError(f"{where}: expected step {step}, found {self.manifest.step}")
        except BaseException:
            self.close()
            raise

    def where(self, rank: int) -> str:
        """What errors call a rank's file."""
        return f"{self.path}/{manifest.file_name(rank, len(self.manifest.files))}"

    def file(self, rank: int) -> tuple[int, list[int]]:
        """The descriptor of a rank's file, and where in it each shard starts.

        Raises:
            CheckpointError: it has not the size and the header that it must have.
        """
        if rank not in self._files:
            where = self.where(rank)
            name = manifest.file_name(rank, len(self.manifest.files))
            file, size = tensorfile.open_file(self._folder, name, where)
            try:
                header, starts = self.manifest.layout(rank)
                tensorfile.check_header(file, size, header, starts[-1], where)
            except BaseException:
                os.close(file)
                raise
            self._files[rank] = (file, starts)
        return self._files[rank]

    def check(self, ranks: Iterable[int], rank: int) -> None:
        """Check the digests of these ranks' files; ``rank`` 0 shows a progress bar.

        Raises:
            CheckpointError: a file is not what was written; as soon as that is known.
        """
        for number in (ranks := list(ranks)):
            self.file(number)
        with closing(self.damage(ranks, rank)) as damage:
            for reason in damage:
                raise CheckpointError(reason)

    def damage(
        self, ranks: Iterable[int], rank: int, threads: int | None = None
    ) -> Generator[str, None, None]:
        """What of these ranks' files is not what was written; ``rank`` 0 shows a progress bar."""
        jobs = []
        total = 0
        for number in ranks:
            try:
                file, starts = self.file(number)
            except CheckpointError as error:
                yield str(error)
                continue
            total += starts[-1] - starts[0]
            for i, shard in enumerate(self.manifest.files[number]):
                jobs.append((number, file, starts[i], starts[i + 1], shard))
        count = threads or min(8, _processors())

        def check(job: tuple[int, int, int, int, manifest.Shard]) -> str | None:
            number, file, start, end, shard = job
            where = self.where(number)
            try:
                found = tensorfile.digest_of(file, start, end, where, bar)
            except CheckpointError as error:
                return str(error)
            if found == shard.digest:
                return None
            name = self.manifest.entries[shard.entry].name
            return f"{where}: {shard.part} of {name}: expected digest {shard.digest}, found {found}"

        with Bar(f"verifying step {self.manifest.step}", total, rank) as bar:
            if count == 1 or len(jobs) < 2 or total < 2**22:
                yield from filter(None, map(check, jobs))
                return
            # The largest first; none left when whoever asked wants to know no more.
            jobs.sort(key=lambda job: job[2] - job[3])
            with ThreadPoolExecutor(count) as pool:
                try:
                    yield from filter(None, pool.map(check, jobs))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def close(self) -> None:
        """Close all files."""
        for file, _ in self._files.values():
            os.close(file)
        self._files.clear()
        os.close(self._folder)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
