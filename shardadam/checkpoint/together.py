"""Ranks fail together: what goes wrong on one rank is the same error on all."""

import json
from collections.abc import Mapping

from shardadam.agreement import Point, Range, meet
from shardadam.checkpoint.errors import CheckpointError, OtherVersion
from shardadam.collectives import Communicator


def together(
    communicator: Communicator,
    point: Point,
    error: Exception | None = None,
    words: Mapping[str, int] | None = None,
) -> dict[str, Range]:
    """Meet the other ranks at ``point``, see [Note: meeting points].

    Raises:
        CheckpointError, OSError, RuntimeError: of the first rank that has an ``error``, here and on
            all other ranks.
    """
    try:
        seen = meet(communicator, point, {**(words or {}), "failed": error is not None})
    except Exception as lost:
        if error is not None:
            raise lost from error
        raise
    if not seen["failed"].high:
        return seen
    if communicator.world_size == 1:
        assert error is not None
        raise error
    reports = communicator.gather_bytes(b"" if error is None else _report(error))
    rank, report = next((rank, text) for rank, text in enumerate(reports) if text)
    kind, number, text = json.loads(report)
    text = f"rank {rank} of {communicator.world_size}: {text}"
    if kind == "OSError" and number:
        raise OSError(number, text) from error
    raise _KINDS.get(kind, RuntimeError)(text) from error


_KINDS: dict[str, type[Exception]] = {
    "CheckpointError": CheckpointError,
    "OtherVersion": OtherVersion,
    "ValueError": ValueError,
    "OSError": OSError,
}


def _report(error: Exception) -> bytes:
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return json.dumps(["OSError", error.errno, f"{error.strerror or error}{place}"]).encode()
    kind = type(error).__name__
    text = str(error) if kind in _KINDS else f"{kind}: {error}"
    return json.dumps([kind, None, text]).encode()
