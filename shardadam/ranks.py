"""This process among its peers: who they are, and what their hosts have to know of each other.

It is exchanged on the host, so that no rank waits for its GPU (but in a process group that is not
the default one and has no backend for CPU tensors).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.alarm import Alarm
from shardadam.exchange import Exchange, Union, await_work, watch
from shardadam.flight import Flight

_TAGS = 1 << 30  # from here on: they must not pair with a user's sends
_WORDS_TAG = _TAGS - 1  # one for all: ranks that are in different places must meet
_FEW = 8


class Ranks:
    """The ranks of ``process_group`` (None: the default one, if there is one).

    Attributes: ``rank`` and ``world_size`` within the group, ``backend`` its name ("none" when
    alone), ``device`` of the tensors, ``timeout`` how long it waits for a rank that hangs (None:
    its backend does not say), ``ordinal`` a number that no other optimizer of these ranks has,
    agreed on at construction, ``made`` how many exchanges it has begun, which is the same on all
    ranks where they meet, ``flight`` a record of the last ones, ``sent_bytes`` what this rank has
    sent so far, by what it was doing: payload, and what a tree or ring sends on average over the
    ranks. Descriptions, which only errors need, are not counted.
    """

    _last_ordinal = 0
    _host_groups: ClassVar[WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]] = (
        WeakKeyDictionary()
    )

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.process_group = process_group
        self.rank, self.world_size, self.backend = 0, 1, "none"
        self.device = device
        self.timeout: timedelta | None = None
        self.ordinal = 0
        self.made = 0
        self.flight = Flight()
        self.sent_bytes: dict[str, int] = {}
        self._alarm: Alarm | None = None
        self._exchanges, self._point_to_point = 0, False
        if process_group is None and not (dist.is_available() and dist.is_initialized()):
            return
        self.rank = dist.get_rank(process_group)
        if self.rank < 0:
            raise ValueError("process_group: this process is not one of its ranks")
        self.world_size = dist.get_world_size(process_group)
        # A group may have one backend per device type, "cpu:gloo,cuda:nccl".
        config = str(dist.get_backend_config(process_group))
        backends = dict(entry.split(":", 1) for entry in config.split(",") if ":" in entry)
        if backends and device.type not in backends:
            raise ValueError(
                f"params are on {device.type}, but the process group's backends are {config}; "
                f"expected one for {device.type}"
            )
        self.backend = backends.get(device.type, config)
        self._point_to_point = self.backend != "nccl" and device.type == "cpu"
        if self.backend in ("gloo", "nccl"):
            self.timeout = self._torch_backend().options._timeout
        self._host_group, self._host_device = self._find_host_group(backends)
        if self.world_size > 1:
            self._alarm = Alarm.of_world()

    def _find_host_group(
        self, backends: Mapping[str, str]
    ) -> tuple[dist.ProcessGroup | None, torch.device]:
        """The same ranks in a group that takes CPU tensors, if there can be one."""
        group, cpu = self.process_group, torch.device("cpu")
        if self.device.type == "cpu" or "cpu" in backends:
            return group, cpu
        world = dist.group.WORLD
        assert world is not None
        if group not in (None, world):
            return group, self.device  # another one can't always be made: see `aside`
        if world not in Ranks._host_groups:
            Ranks._host_groups[world] = dist.new_group(backend="gloo", timeout=self.timeout)
        return Ranks._host_groups[world], cpu

    def _torch_backend(self) -> Any:
        group = self.process_group or dist.group.WORLD
        assert group is not None
        backend = group._get_backend(self.device)
        return getattr(backend, "wrapped_pg", backend)  # by TORCH_DISTRIBUTED_DEBUG=DETAIL

    def inherit_timeout(self, timeout: timedelta | None) -> None:
        """Wait as long as another group does, if nobody has given this one a timeout."""
        if timeout and self.timeout == dist.distributed_c10d._get_default_timeout(
            dist.Backend(self.backend)
        ):
            self._torch_backend()._set_default_timeout(timeout)
            self.timeout = timeout

    def next_ordinal(self) -> int:
        """This rank's proposal for its ``ordinal``."""
        return Ranks._last_ordinal + 1

    def take_ordinal(self, largest_proposal: int) -> None:
        """Set ``ordinal`` once; no later one of this process will be as small."""
        if not self.ordinal:
            self.ordinal = Ranks._last_ordinal = largest_proposal

    def agree(self, words: Sequence[int]) -> tuple[list[int], list[int]]:
        """The smallest and the largest of every word over the ranks (63-bit integers).

        Where the two are equal the ranks agree. One small all-reduce; it opens every exchange, so
        that ranks that have come to different points find out instead of pairing the wrong data.
        Few ranks send their words to each other: half of an all-reduce's latency where gloo's
        threads find a core that is idle, and no more where they don't.
        """
        doing, ranks = "agreeing on what comes next", self.world_size
        if ranks == 1:
            return list(words), list(words)
        own = torch.tensor(words, device=self._host_device)
        if self._host_device.type == "cpu" and ranks <= _FEW:
            seen = [torch.empty_like(own) for _ in range(ranks)]
            seen[self.rank] = own
            with self._says(doing, *seen, sends=own.nbytes * (ranks - 1)):
                for work in self._swap([own] * ranks, seen, self._host_group, _WORDS_TAG):
                    await_work(work, self.timeout)
            low, high = torch.stack(seen).aminmax(dim=0)
            return low.tolist(), high.tolist()
        both = torch.cat([own, -own])
        with self._says(doing, both, sends=2 * self._others(both)):
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._host_group)
        high, low = both.chunk(2)
        return (-low).tolist(), high.tolist()

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """Element by element, whether any rank's flag is set."""
        return self.start_union(flags).wait()

    def start_union(self, flags: Sequence[bool]) -> Union:
        """Begin a `union`; any number may be under way."""
        if self.world_size == 1:
            return Union(torch.tensor(flags), self._exchange("nothing", []))
        tensor = torch.tensor(flags, dtype=torch.uint8, device=self._host_device)
        doing, most = "exchanging which params have gradients", dist.ReduceOp.MAX
        sends = 2 * self._others(tensor)
        with self._says(doing, tensor, sends=sends):
            work = dist.all_reduce(tensor, op=most, group=self._host_group, async_op=True)
        return Union(tensor, self._exchange(doing, [work]))

    def _others(self, tensor: Tensor) -> int:
        """Bytes of ``tensor`` but this rank's shard of it: what reducing or gathering it sends."""
        return tensor.nbytes * (self.world_size - 1) // self.world_size

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's small object, in the order of the ranks; for error reports only."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._says("exchanging descriptions", sends=0):
            dist.all_gather_object(values, value, group=self._host_group)
        return values

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's ``data``, of any lengths, in the order of the ranks."""
        if self.world_size == 1:
            return [data]
        own = torch.tensor([len(data)], device=self._host_device)
        lengths = [torch.empty_like(own) for _ in range(self.world_size)]
        with self._says("exchanging bytes", sends=own.nbytes * (self.world_size - 1)):
            dist.all_gather(lengths, own, group=self._host_group)
            longest = max(int(length) for length in lengths)
            padded = torch.frombuffer(bytearray(data.ljust(longest + 1)), dtype=torch.uint8)
            padded = padded.to(self._host_device)
            gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
            for tensor in (own, padded, *lengths, *gathered):
                watch(tensor)
            self.sent_bytes["exchanging bytes"] += padded.nbytes * (self.world_size - 1)
            dist.all_gather(gathered, padded, group=self._host_group)
        hosts = [tensor.cpu() for tensor in gathered]
        return [
            ctypes.string_at(host.data_ptr(), int(length))
            for host, length in zip(hosts, lengths, strict=True)
        ]

    def _next_tag(self) -> int:
        """Other than those of all that is under way, in this optimizer or another."""
        self._exchanges += 1
        return _TAGS + (self.ordinal % 1024 << 16) + self._exchanges % (1 << 16)

    def _swap(
        self,
        shards: Sequence[Tensor],
        received: Sequence[Tensor],
        group: dist.ProcessGroup | None,
        tag: int,
    ) -> list[dist.Work]:
        """Begin to send every other rank its one of ``shards``, and to receive one from each."""
        ranks, works = self.world_size, []
        for distance in range(1, ranks):
            to, source = (self.rank + distance) % ranks, (self.rank - distance) % ranks
            works += [
                dist.irecv(received[source], group=group, tag=tag, group_src=source),
                dist.isend(shards[to], group=group, tag=tag, group_dst=to),
            ]
        return [work for work in works if work is not None]  # None: not of the group

    def _exchange(
        self, doing: str, works: Sequence[dist.Work], finish: Callable[[], object] | None = None
    ) -> Exchange:
        timeout = self.timeout if self._point_to_point else None
        return Exchange(functools.partial(self._says, doing), works, finish, timeout)

    @contextlib.contextmanager
    def _says(self, doing: str, *tensors: Tensor, sends: int | None = None) -> Iterator[None]:
        """Adds to torch.distributed's error what the ranks were doing, and who is missed.

        Exit waits until ``tensors`` are let go of, see [Note: tensors in flight].
        ``sends`` are the bytes for `sent_bytes`; None: this only waits for what has been begun.
        """
        for tensor in tensors:
            watch(tensor)
        if sends is not None:
            self.made += 1
            self.sent_bytes[doing] = self.sent_bytes.get(doing, 0) + sends
        leg = self.flight.begin(doing, sends or 0)
        try:
            yield
        except RuntimeError as error:
            raise self._failure(doing, error) from error
        leg.seconds = time.time() - leg.began

    def _failure(self, doing: str, error: RuntimeError) -> RuntimeError:
        missed, told = "has a peer died?", str(error).partition("\n")[0]
        if self._alarm is not None:
            whole = self.world_size == dist.get_world_size()
            numbers = "" if whole else "by their numbers in the default group, "
            missed = f"{numbers}{self._alarm.ask()}."
        text = (
            f"rank {self.rank} of {self.world_size} failed while {doing} over {self.backend}, "
            f"{self.flight.place()}: {missed} {told}"
        )
        self.flight.dump(text)
        return RuntimeError(text)
