"""`torch.load` of tensors and plain values, and nothing that would be executed."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from shardadam.checkpoint.errors import CheckpointError

_NAMED = re.compile(r"GLOBAL (\S+)")


def load_plain(
    file: Path | IO[bytes],
    where: str,
    *,
    mapped: bool = False,
    stand_ins: Mapping[str, Any] | None = None,
) -> Any:
    """Read ``file``, on the host; ``where`` is what errors call it.

    ``mapped``: where it can be, so that looking at a large one reads little of it.
    ``stand_ins``: of ours, that take the place of the file's names of others' classes.

    Raises:
        CheckpointError: it holds something else.
    """
    known: list[Any] = [(ours, name) for name, ours in (stand_ins or {}).items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(known):
            warnings.simplefilter("ignore")  # which come of odd bytes, and are not the user's
            mapped = mapped and zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # whatever the bytes provoke
        # torch's own text recommends weights_only=False.
        named = _NAMED.search(str(error))
        unread = f"torch.load can't read it ({type(error).__name__})"
        reason = f"it names {named[1]}" if named else unread
        raise CheckpointError(
            f"{where}: expected tensors and plain values alone, as torch.save writes them: "
            f"{reason[:200]}"
        ) from error
