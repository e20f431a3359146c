"""What a step sends over which links: those inside nodes, and those between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardadam.kernels.run import state_dtype
from shardadam.layout import Bucket
from shardadam.storage import Storage

Spread = Literal["flat", "mesh", "replicated"]
SPREADS: tuple[Spread, ...] = ("flat", "mesh", "replicated")
Transport = Literal["gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class Ways:
    """How ranks are spread over nodes, see docs/hybrid.md; ``spread``: which ranks have state.

    ``shards`` and ``parts``: as in `plan_buckets`.
    """

    spread: Spread
    nodes: int
    places: int

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.nodes * self.places

    @property
    def shards(self) -> int:
        """How many a bucket is cut into."""
        return self.places if self.spread == "replicated" else self.world_size

    @property
    def parts(self) -> int:
        """How many replicas there are of each."""
        return self.nodes if self.spread == "replicated" else 1


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of a step: ``sent`` by a rank, ``inside`` its node of it, and ``across`` by a node."""

    sent: int
    inside: int
    across: int

    def seconds(self, link: float, node_link: float | None, ways: Ways) -> float:
        """On links of so many bytes per second: a rank's in its node, and a node's to others.

        Flat exchanges use both at one time. Those of a mesh go from level to level; how much of
        that is beside each other is not known, and they are added.
        """
        inside = self.inside / link
        across = self.across / (node_link or ways.places * link)
        return max(inside, across) if ways.spread == "flat" else inside + across


def traffic(buckets: Sequence[tuple[Bucket, Storage]], ways: Ways, transport: Transport) -> Traffic:
    """Of a step, without the meetings of ranks.

    gloo sends each rank its shard; NCCL's flat rings pass from node to node once, but its 16-bit
    gradients go from each rank to each, too.
    """
    nodes, places, ranks = ways.nodes, ways.places, ways.world_size
    sent = inside = across = 0
    for bucket, storage in buckets:
        params = bucket.numel * storage.dtype.itemsize
        sums = bucket.numel * state_dtype(storage.dtype).itemsize
        if ways.spread == "flat":
            ring = params * (ranks - 1) // ranks
            sent += 2 * ring
            for in_ring in (transport == "nccl" and params == sums, transport == "nccl"):
                inside += ring if in_ring else params * (places - 1) // ranks
                if nodes > 1:
                    across += ring if in_ring else places * params * (nodes - 1) // nodes
        else:
            in_node = 2 * params * (places - 1) // places
            back = sums if ways.spread == "replicated" else params
            inside += in_node
            across += (sums + back) * (nodes - 1) // nodes
            sent += in_node + (sums + back) * (nodes - 1) // ranks
    return Traffic(sent, inside, across)
