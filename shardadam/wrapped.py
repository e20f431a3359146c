"""Optimizers in wrappers that inherit from the class of what they hold.

Lightning and Fabric wrap an optimizer in an object of a class made from their wrapper's and its
own, so that `isinstance` holds. A method of ours, called on that, would have the wrapper as its
``self``: it reads the optimizer's attributes, but what it sets, the optimizer never sees.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


def on_the_wrapped(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Run ``method`` on the optimizer itself, which ``_itself`` refers to, also from wrappers."""

    @functools.wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        itself: S = self._itself()  # type: ignore[attr-defined]
        return method(itself, *args, **kwargs)

    return run
