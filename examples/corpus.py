"""The text: Python's own standard library, or the user's files; and batches cut from it."""

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT_EVERY = 40
"""One file in so many is never trained on (of the user's files: the last part of each)."""
# Some distributions leave the tests out; third-party packages are nobody's standard library.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from, and bytes to be measured on: 1-D uint8 tensors."""

    train: Tensor
    held_out: Tensor

    @property
    def digest(self) -> str:
        """Changes when the text does; keeps a resumed run from going on with another text."""
        return hashlib.sha256(self.train.numpy()).hexdigest()[:16]

    def batch(
        self, seed: int, step: int, size: int, context: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets [size / world_size, context] of the batch of ``step``.

        The batch is a pure function of ``seed`` and ``step``, so a resumed run sees the same ones;
        the ranks only share it out, so there may be more or fewer of them.
        """
        draw = random.Random(f"{seed}/{step}")
        starts = [draw.randrange(len(self.train) - context) for _ in range(size)]
        mine = starts[rank::world_size]
        rows = torch.stack([self.train[start : start + context + 1] for start in mine]).long()
        return rows[:, :-1], rows[:, 1:]

    def windows(self, context: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's windows of the held-out text: inputs, and targets of which -100 don't count.

        Windows overlap by half, and only the second half of each counts (of the first window, all),
        so every byte but the very first is predicted once, from at least context / 2 bytes where
        there are as many.
        """
        half = context // 2
        text = self.held_out.long()
        for index, start in enumerate(range(0, max(len(text) - 1 - half, 1), half)):
            if index % world_size == rank:
                inputs, targets = (
                    text[start : start + 2 * half],
                    text[start + 1 :][: 2 * half].clone(),
                )
                targets[: half if start else 0] = -100
                # At the end of the text.
                inputs = F.pad(inputs, (0, 2 * half - len(inputs)))
                yield inputs, F.pad(targets, (0, 2 * half - len(targets)), value=-100)


def standard_library() -> Corpus:
    """The sources of the running Python, split by file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)
    )
    return Corpus(
        _join(path.read_bytes() for i, path in enumerate(files) if i % HELD_OUT_EVERY),
        _join(path.read_bytes() for i, path in enumerate(files) if not i % HELD_OUT_EVERY),
    )


def from_files(paths: Sequence[Path]) -> Corpus:
    """The user's files; the end of each is held out."""
    texts = [path.read_bytes() for path in paths]
    cuts = [len(text) - len(text) // HELD_OUT_EVERY for text in texts]
    return Corpus(
        _join(text[:cut] for text, cut in zip(texts, cuts, strict=True)),
        _join(text[cut:] for text, cut in zip(texts, cuts, strict=True)),
    )


def _join(texts: Iterable[bytes]) -> Tensor:
    # frombuffer wants a writable buffer.
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
