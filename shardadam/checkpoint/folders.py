"""The folders of a checkpoint directory: what their names mean, and how one comes to be whole.

    .writing-step-00001234-<attempt>     being written; whoever holds its lock is alive
    step-00001234                        whole: renamed to this when every rank had written
    replaced-step-00001234-<attempt>     was step-00001234 when another attempt took its place
    .deleting-…                          on its way out

A rename is atomic, and all is synced before it. Each attempt has a number of its own, in the name
of its folder and in all its files, so attempts that run at once never share a file.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from shardadam.checkpoint.errors import CheckpointError

_WHOLE = re.compile(r"step-(\d{8,18})|replaced-step-(\d{8,18})-[0-9a-f]{16}")
_LEFT = re.compile(r"\.(writing|deleting)-.*")
_STALE_S = 3600.0
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Candidate:
    """A folder that should hold a whole checkpoint."""

    step: int
    path: Path


def step_of(name: str) -> int | None:
    """The step in the name of a folder that should hold a whole checkpoint."""
    match = _WHOLE.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def candidates(root: Path) -> list[Candidate]:
    """The newest first; of one step the one that was put there last."""
    found = []
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    for name in names:
        step = step_of(name)
        if step is not None:
            found.append(Candidate(step, root / name))
    return sorted(found, key=lambda c: (c.step, c.path.name.startswith("step")), reverse=True)


def open_folder(path: Path) -> int:
    """A folder's descriptor.

    Raises:
        CheckpointError: it is no folder; a link is none.
    """
    try:
        return os.open(path, _FOLDER | os.O_NOFOLLOW)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a folder, found: {error.strerror}") from error


def sync(path: Path) -> None:
    """Make the names in a folder durable."""
    folder = os.open(path, _FOLDER)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Attempt:
    """A checkpoint that is being written."""

    def __init__(self, root: Path, step: int, attempt: str, *, leads: bool) -> None:
        self._root, self._leads = root, leads
        self._final = root / f"step-{step:08d}"
        self._attempt = attempt
        self.path = root / f".writing-{self._final.name}-{attempt}"
        self.folder = -1

    def open(self) -> None:
        """Make the folder, or find it made by another rank."""
        if not self._root.exists():
            self._root.mkdir(parents=True, exist_ok=True)
            sync(self._root.parent)
        self.path.mkdir(exist_ok=True)  # whichever rank comes first
        self.folder = os.open(self.path, _FOLDER | os.O_NOFOLLOW)
        if self._leads:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(self.folder, fcntl.LOCK_SH)

    def publish(self) -> Path:
        """Make it the checkpoint of its step. All its files are there and synced."""
        os.fsync(self.folder)
        replaced = self._root / f"replaced-{self._final.name}-{self._attempt}"
        for _ in range(100):
            if self._final.exists():
                if replaced.exists():
                    remove(replaced)
                with contextlib.suppress(FileNotFoundError):
                    os.rename(self._final, replaced)
            try:
                os.rename(self.path, self._final)
                break
            except OSError as error:
                # Another attempt was there first, again.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        else:
            raise FileExistsError(errno.EEXIST, "others keep writing it", str(self._final))
        sync(self._root)
        if replaced.exists():
            remove(replaced)
        return self._final

    def close(self) -> None:
        """Let go of the folder; the leader removes what has not been published."""
        if self._leads:
            shutil.rmtree(self.path, ignore_errors=True)
        if self.folder >= 0:
            os.close(self.folder)


def remove(path: Path) -> None:
    """Delete a checkpoint; half deleted it no longer has its name."""
    doomed = path.with_name(f".deleting-{path.name.lstrip('.')}-{time.time_ns():x}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(root: Path) -> None:
    """Delete what broken-off attempts left: nobody holds its lock, nothing changed for an hour."""
    for name in os.listdir(root):
        path = root / name
        if _LEFT.fullmatch(name) and not path.is_symlink() and _is_stale(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_stale(path: Path) -> bool:
    try:
        changed = max(os.stat(p).st_mtime for p in [path, *path.iterdir()])
        if time.time() - changed < _STALE_S:
            return False
        folder = open_folder(path)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(folder)
    except (OSError, CheckpointError):
        return False
    return True
