"""What a step costs by a formula: fitted to measurements here, and evaluated for clusters.

Per rank, for P params in B buckets on W ranks:

    CPU = a·P/W + b·P·(W−1)/W + c·B

a: updating what is owned; b: packing, exchanging and summing what goes over the wire; c: what a
bucket costs whatever its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Point:
    """A measurement of one step: ``cost`` per rank."""

    params: int
    world_size: int
    buckets: int
    cost: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Cost per param (a, b) and per bucket (c)."""

    a: float
    b: float
    c: float

    def predict(self, params: int, world_size: int, buckets: int) -> float:
        """The cost of a step on one rank."""
        terms = _terms(params, world_size, buckets)
        return sum(k * t for k, t in zip((self.a, self.b, self.c), terms, strict=True))


def fit(points: Sequence[Point]) -> Fit:
    """Least squares of the relative errors."""
    rows = [[term / p.cost for term in _terms(p.params, p.world_size, p.buckets)] for p in points]
    matrix = torch.tensor(rows, dtype=torch.float64)
    ones = torch.ones(len(points), 1, dtype=torch.float64)
    return Fit(*torch.linalg.lstsq(matrix, ones).solution.flatten().tolist())


def _terms(params: int, world_size: int, buckets: int) -> tuple[float, float, float]:
    return params / world_size, params * (world_size - 1) / world_size, buckets


@dataclass(frozen=True, slots=True)
class Cluster:
    """``per_node`` GPUs; bytes/s that each sends to the next node and within its own, and that its
    memory moves; ``latency``: seconds until a message's first byte arrives."""

    name: str
    per_node: int
    network: float
    inside: float
    memory: float
    latency: float

    def link(self, world_size: int) -> float:
        """Bytes/s of the slowest hop of a ring."""
        return self.inside if world_size <= self.per_node else self.network

    def exchange(self, sent_bytes: float, collectives: int, world_size: int) -> float:
        """Seconds to reduce-scatter or all-gather ``sent_bytes`` per rank in a ring."""
        hops = world_size - 1
        return sent_bytes / self.link(world_size) + collectives * hops * self.latency


@dataclass(frozen=True, slots=True)
class Way:
    """How params, gradients and state are spread, bf16 params with fp32 moments.

    ``passes``: how often P elements of bf16 go over the wire in a step, as reduce-scatters or
    all-gathers. ``whole_bytes`` and ``shard_bytes``: per param on every rank, and per param of
    which 1/W is on every rank. ``touched_bytes``: what the update moves per param that it updates,
    ``sharded``: that is 1/W of them.
    """

    name: str
    passes: int
    whole_bytes: float
    shard_bytes: float
    touched_bytes: float
    sharded: bool

    def memory(self, params: float, world_size: int) -> float:
        """Bytes of params, gradients and state per rank."""
        return params * (self.whole_bytes + self.shard_bytes / world_size)

    def exchange(self, params: float, world_size: int, cluster: Cluster, bucket: float) -> float:
        """Seconds per step on the wire."""
        sent = 2 * params * (world_size - 1) / world_size
        buckets = -(-2 * params // bucket)
        return self.passes * cluster.exchange(sent, int(buckets), world_size)

    def update(self, params: float, world_size: int, cluster: Cluster) -> float:
        """Seconds that the update takes from memory's speed."""
        owned = params / world_size if self.sharded else params
        return owned * self.touched_bytes / cluster.memory


WAYS = (
    # Params and gradients bf16, fp32 master and moments; 28 bytes are moved per param.
    Way("DDP + AdamW", 2, 2 + 2 + 12, 0, 28, False),
    Way("FSDP2 + AdamW", 3, 0, 2 + 2 + 12, 28, True),
    # Split master: 16-bit remainder; fp32 shard of the mean gradient; 28 bytes are moved.
    Way("shardadam, shard_grads", 2, 2, 4 + 8 + 2, 28, True),
)
CLUSTERS = (
    Cluster("8 × H100 a node, 400 Gb/s a GPU", 8, 50e9, 450e9, 3.35e12, 5e-6),
    Cluster("8 × H100 a node, 100 Gb/s a node", 8, 12.5e9 / 8, 450e9, 3.35e12, 10e-6),
)
