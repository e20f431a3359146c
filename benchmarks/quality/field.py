"""The contenders by name, in the order of the tables."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from quality import packages
from quality.contenders import Contender, Ours, Rounded, Task, bf16, companded

FP32, BF16, Q16, Q8 = "fp32", "shardadam bf16", "shardadam q16", "shardadam q8"
NEAREST, COMPANDED = "bf16, to nearest", "FlashOptim, companded 8 bits"
DYNAMIC, AO_8BIT, AO_FP8 = "bitsandbytes, dynamic 8 bits", "torchao 8 bits", "torchao fp8"


@dataclass(frozen=True)
class Entry:
    """``bytes``: of state per param. ``says``: what is run."""

    make: Callable[[Task], Contender]
    bytes: float
    says: str = ""
    package: str | None = None


FIELD = {
    FP32: Entry(partial(Ours, state="fp32"), 8, "our kernel"),
    BF16: Entry(partial(Ours, state="bf16"), 4, "our kernel; exp_avg_sq stochastic"),
    Q16: Entry(partial(Ours, state="q16"), 3 + 4 / 128, "our kernel"),
    Q8: Entry(partial(Ours, state="q8"), 2 + 4 / 128, "our kernel"),
    NEAREST: Entry(partial(Rounded, lose=bf16), 4, "torch operations"),
    COMPANDED: Entry(
        partial(Rounded, lose=companded), 2 + 4 / 32, "published formula of flashoptim 0.1.4"
    ),
    DYNAMIC: Entry(packages.bitsandbytes, 2 + 8 / 256, package="bitsandbytes"),
    AO_8BIT: Entry(packages.torchao_8bit, 2 + 8 / 256, package="torchao"),
    AO_FP8: Entry(packages.torchao_fp8, 2 + 8 / 256, package="torchao"),
}
# torchao's are the slowest, and nearly bitsandbytes' codes.
SWEPT = (FP32, BF16, Q16, Q8, NEAREST, COMPANDED, DYNAMIC)


def why_not(name: str) -> str | None:
    """What is missing."""
    package = FIELD[name].package
    if package is None or _version(package):
        return None
    return f"{package} is not installed: pip install '.[bench]'"


def says(name: str) -> str:
    """What is run, with its version."""
    entry = FIELD[name]
    return entry.says if entry.package is None else f"{entry.package} {_version(entry.package)}"


def make(name: str, task: Task) -> Contender:
    """It, with state of zeros."""
    with _no_complaints():
        return FIELD[name].make(task)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def _no_complaints() -> Iterator[None]:
    """Packages log on import which of their GPU libraries can't be loaded."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
