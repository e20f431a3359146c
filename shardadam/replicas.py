"""Ranks that hold the same elements of a DTensor: all must be alike, and one counts in a norm.

They do where it is replicated over a dim of its mesh (HSDP), and where ranks of the optimizer are
on different meshes (FSDP2 beside tensor parallelism, of what is not parallelized).
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam import dtensors
from shardadam.agreement import digest
from shardadam.block_sums import bits_of
from shardadam.collectives import Communicator


def bit_sum(values: Tensor) -> int:
    """The sum of all elements' bits: another where one has changed."""
    if values.is_complex():
        values = torch.view_as_real(values)
    return int(bits_of(values).sum(dtype=torch.int64))


class Replicas:
    """Of some DTensors.

    Attributes:
        counts: for each param, whether this rank's elements count in a sum over all ranks.
        holders: for each param, which ranks have which of its elements; empty where nobody has
            the same.
        elsewhere: those that ranks on different meshes have, and of which no gradients have been
            compared.

    Args:
        params: DTensors, the same on every rank of ``communicator``.
        names: theirs.
        communicator: the ranks.

    Raises:
        ValueError: ranks that should have the same elements differ, or others than these ranks have
            some too; names the param, on every rank.
    """

    def __init__(
        self, params: Sequence[dtensors.DTensor], names: Sequence[str], communicator: Communicator
    ) -> None:
        self._params = params
        self._names, self._communicator = names, communicator
        self.counts = [True] * len(params)
        self.elsewhere: list[int] = []
        self.holders: list[dict[tuple[int, ...], list[int]]] = []
        of_meshes = {param.device_mesh: param for param in self._params}  # few
        on_meshes = set(map(dtensors.ranks_of, of_meshes.values()))
        of_ranks = communicator.exchange((self._params[0].device_mesh.get_rank(), on_meshes))
        ranks = {rank for rank, _ in of_ranks}
        spread = all(found == {tuple(sorted(ranks))} for _, found in of_ranks)
        if spread and all(map(dtensors.is_sharded_only, self._params)):
            return  # as nearly always: nobody else has this rank's elements
        own = [
            (dtensors.ranks_of(param), dtensors.shard_of(param), bit_sum(dtensors.local_of(param)))
            for param in self._params
        ]
        held = communicator.exchange(own)
        for index, name in enumerate(names):
            meshes = {mesh for mesh, _, _ in (of_rank[index] for of_rank in held)}
            strangers = sorted(set().union(*meshes) - ranks)
            if strangers:
                raise ValueError(
                    f"{name} is distributed also over the ranks {strangers}, which are not in the "
                    "optimizer's process group: expected process_group= of all ranks of its mesh"
                )
            holders = defaultdict(list)
            for rank, of_rank in enumerate(held):
                holders[of_rank[index][1]].append(rank)
            self._compare("the values of", index, holders, [of_rank[index][2] for of_rank in held])
            self.holders.append(dict(holders))
            self.counts[index] = communicator.rank == holders[own[index][1]][0]
            if len(meshes) > 1:
                self.elsewhere.append(index)

    def compare_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Of `elsewhere`: who averages them on one mesh may have forgotten the others. Collective.

        Raises:
            ValueError: they are not the same; on every rank.
        """
        own = [
            0 if (grad := grads[index]) is None else digest(str(bit_sum(grad)))
            for index in self.elsewhere
        ]
        held = self._communicator.exchange(own)
        for place, index in enumerate(self.elsewhere):
            sums = [of_rank[place] for of_rank in held]
            self._compare("the gradient of", index, self.holders[index], sums)
        # By what all ranks said: the next comparison is entered by every rank or by none.
        self.elsewhere = [
            index
            for place, index in enumerate(self.elsewhere)
            if not all(of_rank[place] for of_rank in held)
        ]

    def _compare(
        self,
        what: str,
        index: int,
        holders: dict[tuple[int, ...], list[int]],
        sums: Sequence[int],
    ) -> None:
        for first, *others in holders.values():
            for other in others:
                if sums[other] != sums[first]:
                    raise ValueError(
                        f"{what} {self._names[index]} ({dtensors.describe(self._params[index])}) "
                        f"differ between ranks {first} and {other}, which have the same elements: "
                        "expected equal ones. For pipeline stages, or meshes that don't belong "
                        "together, pass process_group= of one mesh; for data parallelism, let "
                        "FSDP2 have all mesh dims"
                    )
