"""What a step spends its time on: numbers for `stats()`, and ranges for profilers."""

import functools
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


class Phases:
    """Of one optimizer, since it was made: steps, those that were skipped, seconds by phase.

    ``now``: the phase that it is in, if any.
    """

    def __init__(self) -> None:
        self.steps = self.skipped = 0
        self.seconds: dict[str, float] = {}
        self.now = ""

    @property
    def place(self) -> tuple[int, str]:
        """How many steps have been made, and the phase that it is in."""
        return self.steps, self.now

    def count(self, *, skipped: bool) -> None:
        """A step has been made."""
        self.steps += 1
        self.skipped += skipped


def phase(
    name: str,
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Count a method's time into its object's ``_phases``; a range "shardadam.…" in profiles.

    A profile is torch.profiler's, or NVTX under torch.autograd.profiler.emit_nvtx. The time is the
    host's: it does not wait for a GPU.
    """

    def decorate(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            phases: Phases = self._phases  # type: ignore[attr-defined]
            before, phases.now = phases.now, name
            start = time.perf_counter()
            try:
                if not torch._C._autograd._profiler_enabled():
                    return method(self, *args, **kwargs)
                with torch.profiler.record_function(f"shardadam.{name}"):
                    return method(self, *args, **kwargs)
            finally:
                phases.now = before
                took = time.perf_counter() - start
                phases.seconds[name] = phases.seconds.get(name, 0.0) + took

        return run

    return decorate
