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

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing import util
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from shardadam.flight import whereabouts
from shardadam.lifeline import Lifeline, own_address, own_machine

_ASKED, _ENDED = "answer", "ended"
_STALE_S = 10.0
_READ_WITHIN_S = 0.5
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
            try:
                cls._of_world[world] = cls(store, dist.get_rank(), dist.get_world_size())
            except (OSError, RuntimeError) as error:  # no socket or thread to be had
                _log.warning("rank %d will not know which rank failed: %s", dist.get_rank(), error)
                return None
        return cls._of_world[world]

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives it
        self._prefix = f"shardadam/alarm/{attempt}"
        self._store, self._rank, self._world_size = store, rank, world_size
        # Who holds it takes it along when it ends; torch says so in no other way.
        self._holds_store = "server=<nullptr>" not in repr(_innermost(store))
        self._asks = self._answered = self._lost = False
        self._closed = ""
        self._answers: dict[int, dict[str, str]] | None = None
        self._told = 0.0
        inner = _innermost(store)
        self._lifeline = Lifeline(own_address(inner.host, inner.port))
        self._listener, self._watcher = (
            threading.Thread(target=target, args=(store.clone(),), daemon=True)
            for target in (self._listen, self._watch)
        )
        self._listener.start()
        self._watcher.start()
        # Not atexit: forked processes of multiprocessing run nothing of that. Those that are
        # forked from this one don't call it.
        util.Finalize(None, self._leave, exitpriority=0)

    def ask(self) -> str:
        """Where the ranks of the default group are, and which give no sign of life.

        Takes little more than a second, whatever has become of them. Asked once: what has failed
        can't be mended in a process.
        """
        if self._answers is None and not self._closed:
            self._asks = True
            # In a thread: a store whose process is frozen is waited for without a bound.
            threading.Thread(target=self._ask, daemon=True).start()
            self._listener.join(2 * _ANSWERS_WITHIN_S)
            self._lost = self._listener.is_alive() or self._answers is None
        if self._closed:
            return self._closed
        if self._answers is None:
            return _STORE_LOST
        age = time.monotonic() - self._told
        told = _tell(range(self._world_size), self._answers)
        return told if age < _STALE_S else f"{told} (that was {age:.0f} s ago)"

    def _ask(self) -> None:
        try:
            self._wake(self._store.clone())
        except (RuntimeError, dist.DistError):
            pass  # the store is gone

    def _wake(self, store: Any) -> None:
        if store.add(f"{self._prefix}/asked", 1) == 1:
            self._tell_all(store, _ASKED)

    def _tell_all(self, store: Any, word: str) -> None:
        keys = [self._key("wake", rank) for rank in range(self._world_size)]
        store.multi_set(keys, [word] * len(keys))

    def _answer(self, store: Any, answer: Mapping[str, str]) -> None:
        """One key holds all answers, so that each rank reads them in one piece."""
        store.append(f"{self._prefix}/answers", json.dumps([self._rank, answer]) + "\n")

    def _collect(self, store: Any) -> dict[int, dict[str, str]]:
        deadline = time.monotonic() + _ANSWERS_WITHIN_S
        key, answers = f"{self._prefix}/answers", dict[int, dict[str, str]]()
        while True:
            if store.check([key]):
                answers = dict(map(json.loads, store.get(key).splitlines()))
            left = deadline - time.monotonic()
            if left <= 0 or len(answers) == self._world_size:
                silent = set(range(self._world_size)) - answers.keys()
                # Who has no optimizer of ours has no alarm either.
                strangers = [r for r in silent if not store.check([self._key("address", r)])]
                return answers | {rank: {} for rank in strangers}
            # All ranks read: the more there are, the less often each.
            time.sleep(min(left, 0.02 + 0.001 * self._world_size))

    def _watch(self, store: Any) -> None:
        """Until the next rank dies, whose end wakes all, or this process ends."""
        following = (self._rank + 1) % self._world_size

        def find() -> tuple[str, int] | None:
            key = self._key("address", following)
            if not store.check([key]):
                return None
            found = store.get(key).decode()
            if found == _ENDED:
                return None
            host, port, machine = found.split(" ")
            if host.startswith(("127.", "::1")) and machine != own_machine():
                # What listens there is not that rank, and nothing that listens not its death.
                raise OSError(
                    f"on its machine MASTER_ADDR leads to {host}: expected an address by which "
                    "others reach it"
                )
            return host, int(port)

        try:
            host, port = self._lifeline.address
            store.set(self._key("address", self._rank), f"{host} {port} {own_machine()}")
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
                store.append(f"{self._prefix}/closed", ".")
                return
            self._answered = True
            self._answer(store, {"alive": whereabouts()})
            answers = self._collect(store)
            self._told, self._answers = time.monotonic(), answers
        except (RuntimeError, dist.DistError):
            return  # the store is gone; whoever needs it says so
        if not self._asks:
            _log.error(
                "rank %d of %d: a rank has died, or waited for another in vain. %s",
                self._rank,
                self._world_size,
                _tell(range(self._world_size), answers),
            )

    def _leave(self) -> None:
        """Say that this process ends: waiting for it is in vain. Ends the thread, too.

        A thread that returned to Python later, during the interpreter's end, would abort it.
        """
        try:
            self._store.set(self._key("address", self._rank), _ENDED)
        except (RuntimeError, dist.DistError):
            pass  # the store is gone
        self._lifeline.end()
        if self._answered or self._lost or not self._listener.is_alive():
            return
        # multiprocessing calls this while the exception is still under way.
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        ended = "" if error is None else f": {type(error).__name__}: {error}"
        closed = (
            f"rank {self._rank} has ended{ended}; nobody can be asked about the others, since it "
            "held the store by which the ranks found each other"
        )
        try:
            self._answer(self._store, {"ended": ended})
            if self._holds_store:
                self._tell_all(self._store, closed)
                self._wait_for_readers()
            else:
                self._store.set(self._key("wake", self._rank), closed)
        except (RuntimeError, dist.DistError):
            pass  # the store is gone
        self._listener.join(1.0)
        self._watcher.join(1.0)

    def _wait_for_readers(self) -> None:
        """Torch prints a stack of C++ wherever the store goes while it is read: until all have."""
        key, deadline = f"{self._prefix}/closed", time.monotonic() + _READ_WITHIN_S
        while time.monotonic() < deadline:
            if self._store.check([key]) and len(self._store.get(key)) == self._world_size:
                return
            time.sleep(0.005)

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
