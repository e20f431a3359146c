"""Who is alive, and where: asked when a rank has waited for its peers in vain.

[Note: the alarm]

A connection that breaks does not say which rank died, and a timeout says nothing at all. So every
process has a thread that waits at the store by which the ranks have found each other, on a
connection of its own, and costs nothing there. A rank whose exchange has failed wakes those of all
ranks: each answers where its process is, also if the main thread computes or waits. Who has not
answered within a second is dead, frozen or cut off. A process that ends says so before, and with
which exception. All ranks then tell the same: in the error of an exchange, and in the log where
the main thread is not in one that has failed. A rank may wait for another than the one that died,
or compute: so the alarm is raised also by the neighbour of a process that dies (`lifeline`).
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from shardadam.flight import whereabouts
from shardadam.lifeline import Lifeline, own_address

_ASKED = "answer"
_ANSWERS_WITHIN_S = 1.0
_FOREVER = timedelta(days=365)
_STORE_LOST = (
    "nobody can be asked: the store by which the ranks found each other does not answer (rank 0, "
    "or torchrun's agent, holds it: that process is dead, frozen or cut off)"
)

_log = logging.getLogger("shardadam")


class Alarm:
    """Of the ranks of the default process group."""

    _of_world: ClassVar[WeakKeyDictionary[dist.ProcessGroup, Alarm]] = WeakKeyDictionary()

    @classmethod
    def of_world(cls) -> Alarm | None:
        """This process's; None where the ranks have no TCPStore that can be waited at."""
        world = dist.group.WORLD
        assert world is not None
        if world not in cls._of_world:
            store = dist.distributed_c10d._get_default_store()
            inner = _innermost(store)
            if not (isinstance(inner, dist.TCPStore) and hasattr(store, "clone")):  # type: ignore[attr-defined]
                return None
            cls._of_world[world] = cls(store, dist.get_rank(), dist.get_world_size())
        return cls._of_world[world]

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives it
        self._prefix = f"shardadam/alarm/{attempt}"
        self._store, self._rank, self._world_size = store, rank, world_size
        # Who holds it takes it along when it ends; torch says so in no other way.
        self._holds_store = "server=<nullptr>" not in repr(_innermost(store))
        self._asks = self._answered = False
        self._closed = ""
        inner = _innermost(store)
        self._lifeline = Lifeline(own_address(inner.host, inner.port))
        self._threads = [
            threading.Thread(target=target, args=(store.clone(),), daemon=True)
            for target in (self._listen, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._leave, os.getpid())

    def ask(self, ranks: Sequence[int]) -> str:
        """Where ``ranks`` of the default group are, and which give no sign of life.

        Takes little more than a second, whatever has become of them.
        """
        if self._closed:
            return self._closed
        self._asks = True
        answers: dict[int, dict[str, str]] | None = None

        def ask() -> None:
            nonlocal answers
            try:
                store = self._store.clone()
                self._wake(store)
                answers = self._collect(store, ranks)
            except (RuntimeError, dist.DistError):
                pass  # the store is gone

        # In a thread: a store whose process is frozen is waited for without a bound.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * _ANSWERS_WITHIN_S)
        return _STORE_LOST if answers is None else _tell(ranks, answers)

    def _wake(self, store: Any) -> None:
        if store.add(f"{self._prefix}/asked", 1) == 1:
            for rank in range(self._world_size):
                store.set(self._key("wake", rank), _ASKED)

    def _collect(self, store: Any, ranks: Sequence[int]) -> dict[int, dict[str, str]]:
        left, deadline = set(ranks), time.monotonic() + _ANSWERS_WITHIN_S
        answers = {}
        while left:
            for rank in sorted(left):
                if store.check([self._key("answer", rank)]):
                    answers[rank] = json.loads(store.get(self._key("answer", rank)))
            left -= set(answers)
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return answers

    def _watch(self, store: Any) -> None:
        """Until the next rank dies, whose end wakes all, or this process ends."""
        following = (self._rank + 1) % self._world_size

        def find() -> tuple[str, int] | None:
            key = self._key("address", following)
            if not store.check([key]):
                return None
            host, port = store.get(key).decode().rsplit(" ", 1)
            return host, int(port)

        try:
            store.set(self._key("address", self._rank), "{} {}".format(*self._lifeline.address))
            self._lifeline.watch(find, lambda: self._wake(store))
        except OSError as error:
            _log.warning(
                "rank %d can't watch rank %d (%s): if that dies, it is noticed where an exchange "
                "with it fails",
                self._rank,
                following,
                error,
            )
        except (RuntimeError, dist.DistError):
            pass  # the store is gone; whoever needs it says so

    def _listen(self, store: Any) -> None:
        """Until somebody asks, or this process ends."""
        try:
            store.wait([self._key("wake", self._rank)], _FOREVER)
            woken = store.get(self._key("wake", self._rank)).decode()
            if woken != _ASKED:
                self._closed = woken
                return
            self._answered = True
            store.set(self._key("answer", self._rank), json.dumps({"alive": whereabouts()}))
            everybody = range(self._world_size)
            answers = self._collect(store, everybody)
        except (RuntimeError, dist.DistError):
            return  # the store is gone; whoever needs it says so
        if not self._asks:
            _log.error(
                "rank %d of %d: a rank has died, or waited for another in vain. %s",
                self._rank,
                self._world_size,
                _tell(everybody, answers),
            )

    def _leave(self, process: int) -> None:
        """Say that this process ends: waiting for it is in vain. Ends the thread, too.

        A thread that returned to Python later, during the interpreter's end, would abort it.
        """
        if os.getpid() != process:
            return
        self._lifeline.end()
        if self._answered or not self._threads[0].is_alive():
            return
        error = getattr(sys, "last_value", None)
        ended = "" if error is None else f": {type(error).__name__}: {error}"
        closed = (
            f"rank {self._rank} has ended{ended}; nobody can be asked about the others, since it "
            "held the store by which the ranks found each other"
        )
        try:
            self._store.set(self._key("answer", self._rank), json.dumps({"ended": ended}))
            for rank in range(self._world_size) if self._holds_store else [self._rank]:
                self._store.set(self._key("wake", rank), closed)
        except (RuntimeError, dist.DistError):
            pass  # the store is gone
        for thread in self._threads:
            thread.join(1.0)

    def _key(self, what: str, rank: int) -> str:
        return f"{self._prefix}/{what}/{rank}"


def _innermost(store: Any) -> Any:
    while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]
        store = store.underlying_store
    return store


def _tell(ranks: Sequence[int], answers: Mapping[int, Mapping[str, str]]) -> str:
    """What has become of ``ranks``, those first that are missed."""
    silent = [rank for rank in ranks if rank not in answers]
    told = [f"{_named(silent, 'gives', 'give')} no sign of life"] if silent else []
    places: dict[str, list[int]] = {}
    for rank in ranks:
        answer = answers.get(rank, {})
        if "ended" in answer:
            told.append(f"rank {rank} has ended{answer['ended']}")
        elif "alive" in answer:
            places.setdefault(answer["alive"], []).append(rank)
    told += [f"{_named(same, 'is', 'are')} {place}" for place, same in places.items()]
    return "; ".join(told)


def _named(ranks: Sequence[int], one: str, several: str) -> str:
    text = ", ".join(map(str, ranks))
    return f"rank {text} {one}" if len(ranks) == 1 else f"ranks {text} {several}"
