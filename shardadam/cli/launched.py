"""The ranks that a launcher has started: what each says, by the launcher's store, and together.

What is said by the store arrives also where the ranks can't talk to each other, and it is known who
has said nothing: every wait has an end.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from shardadam.cli.telling import CommandError
from shardadam.collectives import Communicator

_LEAVING_S = 10.0


class Launched:
    """This rank and the others; all wait at most ``timeout`` seconds for each other.

    Raises:
        CommandError: the launcher's store can't be reached, or rank 0 says nothing there.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            # Not by torch's rendezvous, where the first rank waits for all others.
            self._store: Any = TCPStore(
                address,
                port,
                self.world_size,
                is_master=self.rank == 0 and not of_agent,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise CommandError(
                f"the launcher's store at {address}:{port} can't be reached: {error}. Expected "
                "MASTER_ADDR to be an address of the first host that all hosts can reach, and no "
                "firewall before MASTER_PORT"
            ) from None
        self._silent: set[int] = set()
        self._key = self._agree_on_key() if of_agent else "doctor"

    @classmethod
    def some(cls) -> bool:
        """Whether a launcher says that there are ranks."""
        return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()

    def share(self, topic: str, said: Any) -> dict[int, Any]:
        """What every rank says of ``topic``, by rank, but for those that say nothing in time."""
        self._say(topic, said)
        deadline = time.monotonic() + self.timeout
        heard = {
            rank: said if rank == self.rank else self._heard(topic, rank, deadline)
            for rank in range(self.world_size)
        }
        return {rank: words for rank, words in heard.items() if words is not None}

    def leave(self) -> None:
        """Wait until all have read what they want: a launcher ends all when the first one fails.

        Those that have been silent before are not waited for. The first rank goes last: it may be
        the one that has the store.
        """
        self._say("bye", True)
        deadline = time.monotonic() + min(_LEAVING_S, self.timeout)
        for rank in self._others:
            self._heard("bye", rank, deadline)
        if self.rank != 0:
            self._say("gone", True)
        for rank in self._others if self.rank == 0 else ():
            self._heard("gone", rank, deadline)

    def _agree_on_key(self) -> str:
        """One that rank 0 has made, and that nobody has spoken under before.

        torchrun's store outlives an attempt, and its agents on several hosts don't count attempts
        alike. So each rank asks under a name of its own, and rank 0 answers all that have asked.

        Raises:
            CommandError: rank 0 says nothing.
        """
        own, asked = f"doctor/{secrets.token_hex(8)}", "doctor/asked"
        if self.rank != 0:
            self._store.append(asked, f"{own} ")
            try:
                self._store.wait([own], timedelta(seconds=self.timeout))
            except RuntimeError:
                raise CommandError(
                    f"nothing was heard of rank 0 within {self.timeout:g} s: see its own output. "
                    "Expected it to be started, and not to die; a longer --timeout if it is slow"
                ) from None
            key: str = self._store.get(own).decode()
            self._store.add(f"{key}/here", 1)
            return key
        deadline, answered = time.monotonic() + self.timeout, 0
        while self._store.add(f"{own}/here", 0) < self.world_size - 1:
            names = self._store.get(asked).decode().split() if self._store.check([asked]) else []
            for name in names[answered:]:  # also of earlier attempts, whose ranks are dead
                self._store.set(name, own)
            answered = len(names)
            if time.monotonic() > deadline:
                break  # `share` finds out who is missing
            time.sleep(0.02)
        return own

    @contextmanager
    def process_group(self, device: torch.device) -> Iterator[Communicator]:
        """All ranks in a process group, while it lasts. Collective.

        Raises:
            RuntimeError: they can't connect to each other.
        """
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore(f"{self._key}/group", self._store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.timeout),
        )
        yield Communicator(None, device)
        dist.destroy_process_group()  # not after an error: it would wait for the others

    def _say(self, topic: str, said: Any) -> None:
        self._store.set(f"{self._key}/{topic}/{self.rank}", json.dumps(said))

    def _heard(self, topic: str, rank: int, deadline: float) -> Any:
        key = f"{self._key}/{topic}/{rank}"
        left = max(deadline - time.monotonic(), 0.01)
        try:
            self._store.wait([key], timedelta(seconds=left))
            return json.loads(self._store.get(key))
        except RuntimeError:  # also that the store has gone, with its host
            self._silent.add(rank)
            return None

    @property
    def _others(self) -> list[int]:
        """The ranks that are still to be reckoned with."""
        return [r for r in range(self.world_size) if r != self.rank and r not in self._silent]
