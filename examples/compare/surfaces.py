"""Paths on two surfaces that are hard to walk down, computed in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from compare.contestants import CONTESTANTS, LRS


@dataclass(frozen=True)
class Surface:
    """``height`` of x and y, which is 0 at ``minimum`` and nowhere less."""

    name: str
    height: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """A bent valley: into it is easy, along it is not (Rosenbrock 1960)."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def beale(x: Tensor, y: Tensor) -> Tensor:
    """Flat, with walls (Beale 1958)."""
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


SURFACES = {
    surface.name: surface
    for surface in (
        Surface("Rosenbrock", rosenbrock, (-1.3, 1.9), (1.0, 1.0), (-1.9, 1.9), (-0.7, 2.6)),
        Surface("Beale", beale, (0.7, 1.8), (3.0, 0.5), (-2.1, 4.5), (-1.3, 2.1)),
    )
}


@dataclass(frozen=True)
class Walk:
    """Where an optimizer went."""

    surface: str
    contestant: str
    lr: float
    places: list[tuple[float, float]]
    heights: list[float]
    """At the places."""


def walk(surface: Surface, contestant: str, lr: float, steps: int) -> Walk:
    """``steps`` steps from the start; an optimizer that leaves float64 stays where it was."""
    place = torch.tensor(surface.start, dtype=torch.float64, requires_grad=True)
    optimizer = CONTESTANTS[contestant]([place], lr)
    places, heights = [], []
    for _ in range(steps + 1):
        height = surface.height(place[0], place[1])
        if not height.isfinite():
            break
        places.append((place[0].item(), place[1].item()))
        heights.append(height.item())
        optimizer.zero_grad()
        height.backward()
        optimizer.step()
    return Walk(surface.name, contestant, lr, places, heights)


def best_walk(job: tuple[str, str, int]) -> Walk:
    """Of a surface, a contestant and a number of steps: the walk whose last tenth is lowest.

    Not the last place alone, which may be low by luck where a walk swings to and fro.
    """
    surface, contestant, steps = job
    walks = [walk(SURFACES[surface], contestant, lr, steps) for lr in LRS]
    whole = [one for one in walks if len(one.places) == steps + 1]
    return min(whole, key=lambda one: fmean(one.heights[-(steps // 10) :]))
