"""Ranks in nodes: what crosses the slow links between nodes does so once per node, not per rank.

[Note: two levels]

A mesh of R nodes (dim 0) of S ranks each (dim 1), W = R * S. What `Communicator` does among all
ranks is done here on two levels, among the ranks of a node and among those of one *place*, one on
each node. Two nodes of two ranks, a bucket of P elements, the state sharded over all ranks:

                   node 0              node 1
               place 0  place 1    place 0  place 1
    gradients  0 1 2 3  0 1 2 3    0 1 2 3  0 1 2 3
    in nodes   0 1 . .  . . 2 3    0 1 . .  . . 2 3     sums of a node, fp32; P / S each
    across     0 . . .  . . 2 .    . 1 . .  . . . 3     the mean; P / W each: what a rank owns

and params come back the same way: across, then in nodes. So each level's part is contiguous, and
place j of node i owns shard j * R + i.

With the state replicated there are S shards, place j of each node owns shard j, and gets all of its
mean: across, shards are reduce-scattered and gathered again. Every replica makes the same update,
and only the node's own ranks are needed for params.

Sums are taken in fp32 on both levels (fp64 for fp64), and divided by W at the end, each element of
the mean by one rank: the same bits in every replica; given sums that are exact, the bits of one
level. The order of a sum is that of the ranks, the same on every run, but where NCCL takes it: of
its own reduce-scatter no order is promised.

A level begins when the one before is done and somebody looks. Gradients cross to other nodes when
the next bucket is sent or an earlier one awaited, so that the slow links are busy meanwhile; params
go on inside the node when they are awaited, beside what of other buckets is still on slow links.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardadam.collectives import Communicator, Mean, cut
from shardadam.exchange import Exchange
from shardadam.kernels import reference


class Relay(Exchange):
    """Data under way in stages, of which each begins when the one before is done.

    ``beside``: begins what can go on while this is awaited.
    """

    def __init__(
        self,
        first: Exchange,
        *later: Callable[[], Exchange],
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        self._stage, self._later, self._beside = first, list(later), beside
        self._at_first = True

    def leave_first(self) -> None:
        """Begin the second stage, unless it has been; waits for the first."""
        if self._at_first:
            self._advance()

    def wait(self) -> None:
        """As in `Exchange`."""
        self.leave_first()
        self._beside()
        while self._later:
            self._advance()
        self._stage.wait()

    def _advance(self) -> None:
        self._stage.wait()
        self._stage, self._at_first = self._later.pop(0)(), False


class Hierarchy(Communicator):
    """A `Communicator` over the ranks of a mesh, see [Note: two levels].

    What is small goes among all ranks at once: words, flags, the gradient norm.

    Args:
        mesh: of all ranks of the default process group, nodes by places.
        device: of the tensors.
        mean: as in `Communicator`.
        replicate_state: whether each node has a copy of the state.

    Raises:
        ValueError: ``mesh`` is of other ranks, or they don't ascend along its dims.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        device: torch.device,
        mean: Mean = reference.mean,
        *,
        replicate_state: bool,
    ) -> None:
        super().__init__(None, device, mean)
        self._ranks: list[list[int]] = mesh.mesh.tolist()
        self._nodes, self._places = mesh.shape
        ranks = [rank for node in self._ranks for rank in node]
        if sorted(ranks) != list(range(self.world_size)):
            raise ValueError(
                f"mesh: expected all {self.world_size} ranks of the default process group, found "
                f"{ranks}"
            )
        columns = zip(*self._ranks, strict=True)
        if any(list(line) != sorted(line) for line in (*self._ranks, *columns)):
            # Process groups number their ranks in ascending order, whatever a mesh says.
            raise ValueError(f"mesh: expected ascending ranks along its dims, found {self._ranks}")
        self._inside = Communicator(mesh.get_group(1), device, mean, " in nodes")
        self._across = Communicator(mesh.get_group(0), device, mean, " across nodes")
        for level in (self._inside, self._across):
            level.sent_bytes, level.flight = self.sent_bytes, self.flight
            level.inherit_timeout(self.timeout)  # torch gives a mesh's groups half an hour
        node, place = self._across.rank, self._inside.rank
        self._replicates = replicate_state
        if replicate_state:
            self.shards, self.shard = self._places, place
            self.replicas, self.replica = self._nodes, node
        else:
            self.shard = place * self._nodes + node
            self.gathers_alone = False
        self._last: Relay | None = None

    def take_ordinal(self, largest_proposal: int) -> None:
        """As in `Ranks`."""
        super().take_ordinal(largest_proposal)
        self._inside.ordinal = self._across.ordinal = self.ordinal

    def sum_exactly(self, words: Tensor) -> None:
        """As in `Communicator`: each element counts once."""
        if self._replicates:
            self._inside.sum_exactly(words)
        else:
            super().sum_exactly(words)

    def start_reduce_scatter_mean(
        self, flat: Tensor, mean: Tensor, lane: int = 0, divisor: int | None = None
    ) -> Exchange:
        """As in `Communicator`."""
        self._cross()
        self.made += 1
        divisor = divisor or self.world_size
        node_sum = self.buffer(f"node sum {lane}", flat.numel() // self._places, mean.dtype)
        own = cut(mean, self.replicas)[self.replica]
        stages: list[Callable[[], Exchange]] = [
            lambda: self._across.start_reduce_scatter_mean(node_sum, own, lane, divisor)
        ]
        if self._replicates:
            stages.append(lambda: self._across.start_all_gather(mean, "gradients"))
        first = self._inside.start_reduce_scatter_mean(flat, node_sum, lane, divisor=1)
        self._last = Relay(first, *stages, beside=self._cross)
        return self._last

    def _cross(self) -> None:
        """Let the bucket that was sent last go on to other nodes."""
        if self._last is not None:
            self._last.leave_first()

    def start_all_gather(self, flat: Tensor, what: str = "params") -> Exchange:
        """As in `Communicator`."""
        self.made += 1
        if self._replicates:
            return self._inside.start_all_gather(flat, what)
        first = self._across.start_all_gather(cut(flat, self._places)[self._inside.rank], what)
        return Relay(first, lambda: self._inside.start_all_gather(flat, what))

    def describe(self) -> str:
        """As in `Communicator`."""
        state = "a copy of the state on each" if self._replicates else "state over all ranks"
        return f"{super().describe()}, {self._nodes} nodes of {self._places}, {state}"

    def _owners(self, to: int) -> list[int]:
        if self._replicates:  # the node's own
            return next(node for node in self._ranks if to in node)
        return [node[place] for place in range(self._places) for node in self._ranks]
