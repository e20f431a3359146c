"""From what ranks measured in rounds to a row of a table."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.rank import Measured
from training.rounds import Outcome


@dataclass(frozen=True)
class Spread:
    """First quartile, median and third quartile of all iterations of all rounds."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.middle >= 100 else 1 if self.middle >= 10 else 2
        low, middle, high = (f"{value:.{digits}f}" for value in (self.low, self.middle, self.high))
        return f"{middle} ({low}-{high})"


@dataclass(frozen=True)
class Row:
    """Of one contender in one setting; times in ms, per rank, bytes per rank."""

    contender: str
    wall: Spread
    cpu: Spread
    step: Spread
    step_cpu: Spread
    peak_rss_bytes: float
    training_peak_rss_bytes: float
    state_bytes: float
    params: int
    device_bytes: float | None
    sent: dict[str, float]
    loss: float


def row_of(outcome: Outcome) -> Row:
    """Medians over rounds; the worst rank's memory, the mean of what ranks sent."""
    rounds = outcome.rounds
    first = rounds[0][0]
    devices = [one.device_bytes for ranks in rounds for one in ranks]
    return Row(
        outcome.contender,
        _spread(rounds, lambda one: one.wall_ms),
        _spread(rounds, lambda one: one.cpu_ms),
        _spread(rounds, lambda one: one.step_wall_ms),
        _spread(rounds, lambda one: one.step_cpu_ms),
        _worst(rounds, lambda one: one.peak_rss_bytes),
        _worst(rounds, lambda one: one.training_peak_rss_bytes),
        _worst(rounds, lambda one: one.state_bytes),
        first.params,
        None if None in devices else statistics.fmean(devices),
        {
            name: statistics.fmean(one.sent[name] for ranks in rounds for one in ranks)
            for name in first.sent
        },
        first.loss,
    )


def _spread(
    rounds: Sequence[Sequence[Measured]], values: Callable[[Measured], list[float]]
) -> Spread:
    # An iteration's is the mean of its ranks', which wait for each other.
    iterations = [
        statistics.fmean(ranks)
        for one_round in rounds
        for ranks in zip(*map(values, one_round), strict=True)
    ]
    return Spread(*statistics.quantiles(iterations, n=4, method="inclusive"))


def _worst(rounds: Sequence[Sequence[Measured]], value: Callable[[Measured], float]) -> float:
    return statistics.median(max(map(value, ranks)) for ranks in rounds)
