"""Ranks meet before they exchange data: every collective is entered by every rank or by none.

[Note: meeting points]

All data exchanges are opened by one exchange of a few words (`Ranks.agree`) in which each rank says
where it is and in which optimizer, whether something is wrong with it, and digests of what must be
equal. If a rank called `step()` while another is in a backward pass or in another optimizer's step,
if one found a bad gradient, if lr differs, then every rank learns so here and raises an error that
says who and what; nobody is left waiting in a collective that will never be answered, and no state
has been changed yet.
"""

import enum
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardadam.collectives import Communicator


class Point(enum.IntEnum):
    """Where ranks meet; `_NAMES` is what errors call them."""

    CONSTRUCTION = 1
    BACKWARD = 2
    BACKWARD_END = 3
    CLIP = 4
    STEP = 5
    CONSOLIDATION = 6
    SAVE = 7
    LOAD = 8
    UPDATED = 9
    LOOP = 10


_NAMES = {
    Point.CONSTRUCTION: "construction of the optimizer",
    Point.BACKWARD: "backward()",
    Point.BACKWARD_END: "the end of backward()",
    Point.CLIP: "clip_grad_norm_()",
    Point.STEP: "step()",
    Point.CONSOLIDATION: "consolidate_state_dict()",
    Point.SAVE: "saving a checkpoint",
    Point.LOAD: "loading a checkpoint",
    Point.UPDATED: "the end of the update",
    Point.LOOP: "the end of a step of the loop",
}


# As many at every point: ranks at different points must still understand each other.
_WORDS = 8


@dataclass(frozen=True, slots=True)
class Range:
    """The smallest and the largest of a word over the ranks."""

    low: int
    high: int

    @property
    def agreed(self) -> bool:
        """Whether every rank said the same."""
        return self.low == self.high


def digest(text: str | bytes) -> int:
    """A small number that differs where ``text`` does (CRC-32)."""
    return zlib.crc32(text.encode() if isinstance(text, str) else text)


def meet(
    communicator: Communicator,
    point: Point,
    words: Mapping[str, int] | None = None,
    error: Exception | None = None,
) -> dict[str, Range]:
    """Meet the other ranks at ``point``, see [Note: meeting points].

    Args:
        communicator: the ranks.
        point: where this rank is.
        words: non-negative integers under 2^63, the same names on every rank.
        error: what went wrong on this rank, if anything: raised here, and reported by the others.

    Raises:
        RuntimeError: ranks are at different points, or another rank has an error.
    """
    words = words or {}
    assert len(words) <= _WORDS
    if communicator.world_size == 1:
        if error is not None:
            raise error
        return {name: Range(word, word) for name, word in words.items()}
    padding = [0] * (_WORDS - len(words))
    made = communicator.made
    try:
        low, high = communicator.agree(
            [error is not None, point, communicator.ordinal, made, *words.values(), *padding]
        )
    except RuntimeError as lost:
        if error is not None:
            raise error from lost
        raise
    if low[1:3] != high[1:3]:
        place = _NAMES[point]
        if low[2] != high[2]:
            place += f" of optimizer {communicator.ordinal}"
        points = communicator.exchange(place)
        places = ", ".join(f"rank {rank} is in {place}" for rank, place in enumerate(points))
        raise RuntimeError(
            f"ranks have come to different points: {places}. Every rank must run the same number "
            "of backward passes, no_sync() contexts and steps."
        ) from error
    if low[3] != high[3]:
        raise RuntimeError(
            f"ranks have come to {_NAMES[point]} after different numbers of exchanges, {low[3]} to "
            f"{high[3]}: expected the same calls on every rank. Params and state may not belong "
            "together. Load a checkpoint into a new optimizer"
        ) from error
    if high[0]:
        reports = communicator.exchange(
            None if error is None else f"{type(error).__name__}: {error}"
        )
        if error is not None:
            raise error
        culprits = "; ".join(
            f"rank {rank}: {report}" for rank, report in enumerate(reports) if report
        )
        raise RuntimeError(f"another rank stopped before {_NAMES[point]}: {culprits}")
    return {
        name: Range(*pair)
        for name, pair in zip(words, zip(low[4:], high[4:], strict=True), strict=False)
    }


def difference(communicator: Communicator, lines: Sequence[str]) -> ValueError:
    """The error for ``lines`` that are not the same on every rank. Collective."""
    return ValueError(f"ranks differ: {first_difference(communicator.exchange(lines))}")


def first_difference(descriptions: Sequence[Sequence[str]]) -> str:
    """Name the first entry in which the ranks' lists of descriptions differ."""
    for index in range(max(len(lines) for lines in descriptions)):
        entries = [lines[index] if index < len(lines) else "nothing" for lines in descriptions]
        for rank, entry in enumerate(entries):
            if entry != entries[0]:
                return f"rank 0 has {entries[0]}, rank {rank} has {entry}"
    raise AssertionError("no difference")
