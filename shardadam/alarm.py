"""Who is alive, and where: asked when a rank has waited for its peers in vain.

[Note: the alarm]

A connection that breaks does not say which rank died, and a timeout says nothing at all. So every
process has a thread that waits at the store by which the ranks have found each other, on a
connection of its own, and costs nothing there. A rank whose exchange has failed wakes those of all
ranks: each answers where its process is, also if the main thread computes or waits. Who has not
answered within a second is dead, frozen or cut off. A process that ends, or destroys the process
group, says so before, and with which exception. All ranks then tell the same: in the error of an
exchange, and in the log where the main thread is not in one that has failed. A rank may wait for
another than the one that died, or compute: so the alarm is raised also by the neighbour of a
process that dies (`lifeline`).

Questions are numbered, and each is asked by whoever comes first. Who asks for the same number joins
it, so that one death is one question.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing import util
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from shardadam.flight import whereabouts
from shardadam.lifeline import Lifeline, own_address, own_machine

if dist.is_available():
    # Its functions have the default group as a default argument: imported by the first optimizer,
    # as dynamo does, it would keep that group, and its store, beyond destroy_process_group().
    import torch.distributed.nn.functional  # noqa: F401

_ASKED, _LEAVES, _ENDED = "answer", "leave", "ended"
_STALE_S = 10.0
_READ_WITHIN_S = 0.5
_ANSWERS_WITHIN_S = 1.0
_STORE_ANSWERS_WITHIN_S = 3.0
_JOINED_WITHIN_S = 1.0
_FOREVER = timedelta(days=365)
_STORE_LOST = (
    "nobody can be asked: the store by which the ranks found each other does not answer (rank 0, "
    "or torchrun's agent, holds it: that process is dead, frozen or cut off)"
)

_log = logging.getLogger("shardadam")


class Alarm:
    """Of the ranks of the default process group, until this process destroys it or ends."""

    _of_world: ClassVar[WeakKeyDictionary[dist.ProcessGroup, Alarm]] = WeakKeyDictionary()
    _made: ClassVar[int] = 0

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
                alarm = cls(store, dist.get_rank(), dist.get_world_size())
            except (OSError, RuntimeError) as error:  # no socket or thread to be had
                _log.warning("rank %d will not know which rank failed: %s", dist.get_rank(), error)
                return None
            cls._of_world[world] = alarm
            weakref.finalize(world, alarm._leave, "has destroyed the process group").atexit = False
        return cls._of_world[world]

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        # A store may outlive a process group, and what was said in it.
        self._prefix = f"shardadam/alarm/{Alarm._made}"
        self._store, self._rank, self._world_size = store, rank, world_size
        self._pid = os.getpid()
        # Who holds it takes it along when it ends; torch says so in no other way.
        self._holds_store = "server=<nullptr>" not in repr(_innermost(store))
        self._heard = threading.Condition()
        self._asks = False
        self._closed = self._gone = ""
        self._answers: dict[int, dict[str, str]] = {}
        self._told = float("-inf")
        inner = _innermost(store)
        self._lifeline = Lifeline(own_address(inner.host, inner.port))
        # That of the next question: who comes late has not missed those before.
        self._number = store.add(self._key("questions"), 0)
        store.add(self._key("listening"), 1)
        # Its own, since a question may wait for ever; made now, since later it may be in vain.
        self._asking = store.clone()
        self._threads = [
            threading.Thread(target=target, args=(store.clone(),), daemon=True)
            for target in (self._listen, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        Alarm._made += 1
        # Not atexit: forked processes of multiprocessing run nothing of that. Those that are
        # forked from this one don't call it.
        self._at_exit = util.Finalize(None, self._end, exitpriority=0)

    def ask(self) -> str:
        """Where the ranks of the default group are, and which give no sign of life.

        Takes little more than a second, whatever has become of them.
        """
        with self._heard:
            answered = True
            if not (self._closed or self._knows()):
                number, self._asks = self._number, True
                # In a thread: a store whose process is frozen is waited for without a bound.
                threading.Thread(target=self._ask, args=(number,), daemon=True).start()
                answered = self._heard.wait_for(
                    lambda: bool(self._closed) or self._number > number, _STORE_ANSWERS_WITHIN_S
                )
                self._asks = False
        if answered and not self._closed:
            return self._last()
        why = self._closed or _STORE_LOST
        return f"{why}; before, {self._last()}" if self._answers else why

    def _last(self) -> str:
        """What was told last."""
        age = time.monotonic() - self._told
        told = _tell(range(self._world_size), self._answers)
        return told if age < _STALE_S else f"{told} (that was {age:.0f} s ago)"

    def _knows(self) -> bool:
        """Whether the last answers still tell why an exchange fails: a death does for longer."""
        lost = any("alive" not in self._answers.get(r, {}) for r in range(self._world_size))
        return time.monotonic() - self._told < (3 * _STALE_S if lost else _ANSWERS_WITHIN_S)

    def _ask(self, number: int) -> None:
        try:
            self._wake(self._asking, number)
        except RuntimeError:
            pass  # the store is gone, as the listener finds too

    def _wake(self, store: Any, number: int) -> None:
        if store.add(self._key(f"{number}/asked"), 1) == 1:
            store.add(self._key("questions"), 1)
            keys = [self._wake_key(number, rank) for rank in range(self._world_size)]
            store.multi_set(keys, [_ASKED] * len(keys))

    def _listen(self, store: Any) -> None:
        """Until this process leaves, or the one that holds the store."""
        try:
            while not self._closed:
                self._hear(store)
            store.add(self._key("listening"), -1)
        except RuntimeError:  # the store is gone
            self._close(_STORE_LOST)

    def _hear(self, store: Any) -> None:
        """One word: a question, or that there will be none any more."""
        key = self._wake_key(self._number, self._rank)
        store.wait([key], _FOREVER)
        word = store.get(key).decode()
        if word == _ASKED and not self._gone:
            self._answer(store)
            return
        closed = self._say_farewell(store) if self._gone else word
        self._lifeline.end()  # nobody can be told of a death any more
        self._close(closed)

    def _close(self, why: str) -> None:
        with self._heard:
            self._closed = self._closed or why
            self._heard.notify_all()

    def _answer(self, store: Any) -> None:
        # One key holds all answers, so that each rank reads them in one piece.
        key = self._key(f"{self._number}/answers")
        store.append(key, _line(self._rank, {"alive": whereabouts()}))
        answers = self._collect(store, key)
        with self._heard:
            self._told, self._answers = time.monotonic(), answers
            self._number += 1
            asks = self._asks
            self._heard.notify_all()
        if not asks:
            _log.error(
                "rank %d of %d: a rank has died, or waited for another in vain. %s",
                self._rank,
                self._world_size,
                _tell(range(self._world_size), answers),
            )

    def _collect(self, store: Any, key: str) -> dict[int, dict[str, str]]:
        deadline = time.monotonic() + _ANSWERS_WITHIN_S
        while True:
            answers = _read(store, self._key("gone")) | _read(store, key)
            left = deadline - time.monotonic()
            if left <= 0 or len(answers) == self._world_size or self._gone:
                silent = set(range(self._world_size)) - answers.keys()
                # Who has no optimizer of ours has no alarm either.
                unknown = [r for r in silent if not store.check([self._key(f"address/{r}")])]
                return answers | {rank: {"unknown": ""} for rank in unknown}
            # All ranks read: the more there are, the less often each.
            time.sleep(min(left, 0.02 + 0.001 * self._world_size))

    def _watch(self, store: Any) -> None:
        """Until the next rank dies, whose end wakes all, or this process leaves."""
        following = (self._rank + 1) % self._world_size

        def find() -> tuple[str, int] | None:
            key = self._key(f"address/{following}")
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
            store.set(self._key(f"address/{self._rank}"), f"{host} {port} {own_machine()}")
            self._lifeline.watch(find, lambda: self._wake(store, self._number))
        except OSError as error:
            _log.warning(
                "rank %d can't watch rank %d (%s): if that dies, it is noticed where an exchange "
                "with it fails",
                self._rank,
                following,
                error,
            )
        except RuntimeError:
            pass  # the store is gone; whoever needs it says so

    def _end(self) -> None:
        """Leave, because this process ends."""
        # multiprocessing calls this while the exception is still under way.
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        self._leave("has ended" if error is None else f"has ended: {type(error).__name__}: {error}")

    def _leave(self, how: str) -> None:
        """Say that waiting for this process is in vain. Ends the threads, too.

        One that returned to Python later, during the interpreter's end, would abort it. And a store
        that is held on to would be found by the ranks of the next process group.
        """
        if self._gone or os.getpid() != self._pid:
            return
        self._gone = how
        self._at_exit.cancel()
        if not self._closed:
            keys = [*self._wake_keys([self._rank]), self._key(f"address/{self._rank}")]
            with contextlib.suppress(RuntimeError):  # the store may be gone
                # It waits for no reply of the store, which may be frozen.
                self._store.multi_set(keys, [*[_LEAVES] * (len(keys) - 1), _ENDED])
        self._lifeline.end()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOINED_WITHIN_S)
        if self._holds_store:
            self._wait_for_readers()
        self._close(f"rank {self._rank} {how}")
        self._store = self._asking = None

    def _say_farewell(self, store: Any) -> str:
        """Why nobody can be asked any more."""
        store.append(self._key("gone"), _line(self._rank, {"gone": self._gone}))
        closed = f"rank {self._rank} {self._gone}"
        if self._holds_store:
            closed += (
                "; nobody can be asked about the others, since it held the store by which the "
                "ranks found each other"
            )
            keys = self._wake_keys([r for r in range(self._world_size) if r != self._rank])
            store.multi_set(keys, [closed] * len(keys))
        return closed

    def _wait_for_readers(self) -> None:
        """Torch prints a stack of C++ wherever the store goes while it is read: until all have."""
        deadline = time.monotonic() + _READ_WITHIN_S
        while self._store.add(self._key("listening"), 0) > 0 and time.monotonic() < deadline:
            time.sleep(0.005)

    def _key(self, what: str) -> str:
        return f"{self._prefix}/{what}"

    def _wake_key(self, number: int, rank: int) -> str:
        return self._key(f"{number}/wake/{rank}")

    def _wake_keys(self, ranks: Sequence[int]) -> list[str]:
        """Where they wait now: some may be one question ahead."""
        numbers = (self._number, self._number + 1)
        return [self._wake_key(number, rank) for rank in ranks for number in numbers]


def _innermost(store: Any) -> Any:
    while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]
        store = store.underlying_store
    return store


def _line(rank: int, answer: Mapping[str, str]) -> str:
    return json.dumps([rank, answer]) + "\n"


def _read(store: Any, key: str) -> dict[int, dict[str, str]]:
    """The answers that have been appended to ``key``."""
    return dict(map(json.loads, store.get(key).splitlines())) if store.check([key]) else {}


def _tell(ranks: Sequence[int], answers: Mapping[int, Mapping[str, str]]) -> str:
    """What has become of ``ranks``, those first that are missed."""
    silent = [rank for rank in ranks if rank not in answers]
    told = [f"{_and_verb(silent, 'gives', 'give')} no sign of life"] if silent else []
    unknown = [rank for rank in ranks if "unknown" in answers.get(rank, {})]
    if unknown:
        had = _and_verb(unknown, "has", "have")
        told.append(f"{had} made no optimizer, and may be dead or alive")
    places: dict[str, list[int]] = {}
    for rank in ranks:
        answer = answers.get(rank, {})
        if "gone" in answer:
            told.append(f"rank {rank} {answer['gone']}")
        elif "alive" in answer:
            places.setdefault(answer["alive"], []).append(rank)
    told += [f"{_and_verb(same, 'is', 'are')} {place}" for place, same in places.items()]
    return "; ".join(told)


def _and_verb(ranks: Sequence[int], one: str, several: str) -> str:
    return f"{named(ranks)} {one if len(ranks) == 1 else several}"


def named(ranks: Sequence[int]) -> str:
    """As "rank 1" and "ranks 1, 2"."""
    text = ", ".join(map(str, ranks))
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
