"""What the figures should come to: ratios of two contenders of one table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from training import contenders as c
from training.results import Row
from training.rounds import Setting

PEERS = (c.DDP, c.ZERO, c.FSDP2, c.ZERO1, c.ZERO2, c.ZERO2_CPU)


@dataclass(frozen=True)
class Goal:
    """``value`` of ours over ``value`` of ``peer`` is to be at most ``most``."""

    says: str
    model: str
    world_size: int
    value: Callable[[Row], float]
    peer: str
    most: float


@dataclass(frozen=True)
class Found:
    """What came out for one of our contenders."""

    says: str
    ours: str
    ratio: float
    most: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.most


def _cpu(row: Row) -> float:
    return row.cpu.middle


def _wall(row: Row) -> float:
    return row.wall.middle


def _step(row: Row) -> float:
    # One rank waits for nobody: its CPU time is its time, and other programs don't lengthen it.
    return row.step_cpu.middle


def _peak(row: Row) -> float:
    return row.peak_rss_bytes


GOALS = [
    Goal("iteration CPU", "mlp-35M", 2, _cpu, c.DDP, 1.0),
    Goal("iteration CPU", "mlp-35M", 2, _cpu, c.ZERO2, 0.6),
    Goal("iteration CPU", "mlp-35M", 2, _cpu, c.ZERO2_CPU, 0.6),
    Goal("iteration wall", "mlp-29M", 2, _wall, c.FSDP2, 0.5),
    *(Goal("peak RSS", "mlp-35M", 2, _peak, peer, 1.0) for peer in PEERS),
    Goal("step CPU", "small-300", 1, _step, c.LOCAL, 0.25),
    Goal("step CPU", "small-300", 1, _step, c.FSDP2, 0.06),
]
GRADIENTS_AND_PARAMS = ("reduce-scattering gradients", "all-gathering params")


def found(setting: Setting, rows: Sequence[Row]) -> Iterator[Found]:
    """The goals that this table speaks to."""
    ours = [row for row in rows if row.contender.startswith(c.OURS)]
    for goal in GOALS:
        if (goal.model, goal.world_size, "fp32") == (
            setting.model,
            setting.world_size,
            setting.dtype,
        ) and not setting.link:
            for peer in (row for row in rows if row.contender == goal.peer):
                for row in ours:
                    ratio = goal.value(row) / goal.value(peer)
                    yield Found(f"{goal.says} / {goal.peer}", row.contender, ratio, goal.most)
    if setting.world_size > 1:
        for row in ours:
            yield from _wire(setting, row)


def _wire(setting: Setting, row: Row) -> Iterator[Found]:
    """Gradients and params once, in their dtype, and nothing else but words."""
    size = {"fp32": 4, "bf16": 2}[setting.dtype]
    once = 2 * row.params * size * (setting.world_size - 1) / setting.world_size
    payload = sum(row.sent.get(name, 0) for name in GRADIENTS_AND_PARAMS)
    # Spans begin at multiples of 128 elements, shards are as long as the longest.
    padding = 1.001
    yield Found("gradients and params sent / 2·P·(W−1)/W", row.contender, payload / once, padding)
    rest = sum(row.sent.values()) - payload
    yield Found("other bytes sent per step / 4096", row.contender, rest / 4096, 1.0)
    if row.device_bytes is not None:
        # Headers: under 1 % on the loopback device, 5 % and acknowledgements on a link.
        counted = row.device_bytes / sum(row.sent.values())
        yield Found(
            "device's bytes / counted", row.contender, counted, 1.02 + 0.06 * bool(setting.link)
        )
