"""A rank that dies, freezes, ends or is late is named by all others, soon, with where they were."""

import atexit
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardadam
from models import loss_of, mlp, train
from ranks import logged, run_ranks
from shardadam import alarm, checkpoint
from shardadam.checkpoint import tensorfile
from shardadam.lifeline import Lifeline

WITHIN_S = 2.0  # of the death
TIMEOUT_S = 3.0
LOST = 2  # of three ranks
# The place at which a rank is lost, and where the others then say they are.
PLACES = {
    "backward": ("reduce-scattering gradients", r"after step 3"),
    "before reduce": ("reduce-scattering gradients", r"in step 4 \(reduce\)"),
    "between reduce and update": ("all-gathering params", r"in step 4 \((update|gather)\)"),
    "in update": ("all-gathering params", r"in step 4 \((update|gather)\)"),
    "in gather": ("all-gathering params|agreeing on what", r"in step (4 \(gather\)|5 \(meet\))"),
    "in save": ("agreeing on what comes next|exchanging", r"after step 3"),
}


def arm(optimizer: shardadam.AdamW, place: str, model, act) -> None:
    """Have ``act()`` called at that place of the next step."""

    def before(name: str) -> None:
        method = getattr(optimizer, name)

        def acts(*args, **kwargs):
            act()
            return method(*args, **kwargs)

        setattr(optimizer, name, acts)

    if place == "backward":  # the meeting is over, and the first bucket is not reduced
        model[0].bias.register_hook(lambda grad: act())
    elif place == "in update":
        optimizer._updater.run = lambda *_: act()
    elif place == "in save":
        tensorfile.write_all = lambda *_: act()
    else:
        before(
            {
                "before reduce": "_reduce",
                "between reduce and update": "_update",
                "in gather": "_settle",
            }[place]
        )


def lose(rank: int, place: str, number: int, folder: str) -> tuple[float, str]:
    """Seconds from the loss until this rank is told, and the text of its error.

    It is told by the error, or before by the log: a rank may wait for one that has failed as well.
    """
    records = logged()
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), shard_grads=place == "backward")
    train(model, optimizer, range(3))
    mark = Path(folder, "lost")

    def act() -> None:
        mark.write_text(str(time.time()))
        os.kill(os.getpid(), number)

    if rank == LOST:
        arm(optimizer, place, model, act)
    with pytest.raises(RuntimeError) as caught:
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        if place == "in save":
            checkpoint.save(folder, step=3, optimizer=optimizer, model=model)
        for _ in range(2):  # who has what it needs is not held up, and learns of it in the next
            optimizer.step()
    named = [record.created for record in records if "no sign of life" in record.getMessage()]
    return min([time.time(), *named]) - float(mark.read_text()), str(caught.value)


@pytest.mark.fault("kill -9 {place}", "an error that names it, 2 s")
@pytest.mark.parametrize("place", PLACES)
def test_a_dead_rank_is_named_within_two_seconds(place, tmp_path, record_property):
    doing, where = PLACES[place]
    *told, _ = run_ranks(3, lose, place, signal.SIGKILL, str(tmp_path), lost=[LOST])
    record_property("seconds", max(seconds for seconds, _ in told))
    for rank, (seconds, text) in enumerate(told):
        assert seconds < WITHIN_S, text
        assert re.match(rf"rank {rank} of 3 failed while ({doing}).* over gloo, ({where}): ", text)
        assert "rank 2 gives no sign of life; rank" in text


@pytest.mark.fault("SIGSTOP of one rank", "an error that names it, timeout + 5 s")
def test_a_frozen_rank_is_named_within_the_timeout(tmp_path, record_property):
    *told, _ = run_ranks(
        3,
        lose,
        "between reduce and update",
        signal.SIGSTOP,
        str(tmp_path),
        lost=[LOST],
        peer_timeout_s=TIMEOUT_S,
    )
    record_property("seconds", max(seconds for seconds, _ in told))
    for seconds, text in told:
        assert seconds < TIMEOUT_S + 5, text
        assert "rank 2 gives no sign of life; rank" in text and "in step 4" in text


def frozen_first(rank: int) -> str:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(RuntimeError) as caught:
        train(model, optimizer, range(1))
    return str(caught.value)


@pytest.mark.fault("SIGSTOP of rank 0, which holds the store", "an error that says so")
def test_a_frozen_rank_that_holds_the_store():
    _, *told = run_ranks(3, frozen_first, lost=[0], peer_timeout_s=TIMEOUT_S)
    for text in told:
        assert "the store by which the ranks found each other does not answer (rank 0, or" in text


def computes(rank: int, folder: str) -> tuple[float, str]:
    """Rank 0 computes while rank 1 finds rank 2 dead: what it is told meanwhile, and when."""
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    records, mark = logged(), Path(folder, "lost")
    if rank == LOST:
        time.sleep(0.5)  # until it is watched
        mark.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        time.sleep(4.0)  # the longest of a forward pass
        return records[0].created - float(mark.read_text()), records[0].getMessage()
    with pytest.raises(RuntimeError):
        train(model, optimizer, range(1))
    return 0.0, ""


@pytest.mark.fault("kill -9 while another rank computes", "told in its log, 2 s")
def test_a_rank_that_computes_is_told_by_the_log(tmp_path):
    (seconds, text), *_ = run_ranks(3, computes, str(tmp_path), lost=[LOST])
    assert seconds < WITHIN_S
    assert text.startswith(
        "rank 0 of 3: a rank has died, or waited for another in vain. rank 2 gives"
    )
    assert "rank 0 is after step 1, at test_failures.py" in text and "time.sleep(4.0)" in text


def at_exit(error: Exception | None) -> None:
    """End as the interpreter does."""
    if error is not None:
        sys.last_value = error
    atexit._run_exitfuncs()
    os._exit(1)


def as_a_process(error: Exception | None) -> None:
    """End as a forked `multiprocessing.Process` does, which runs nothing of atexit."""
    try:
        if error is not None:
            raise error
    finally:  # as Process._bootstrap()
        util._exit_function()
        os._exit(1)


def ends(rank: int, leave: Callable[[Exception | None], None], error: Exception | None) -> str:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    if rank == LOST:
        leave(error)
    if error is None:  # nor is it taken for dead
        records = logged()
        time.sleep(1.5)  # longer than an alarm takes
        assert [record.getMessage() for record in records] == []
        time.sleep(0.5)  # until the other rank has seen that too
    with pytest.raises(RuntimeError) as caught:
        train(model, optimizer, range(1))
    return str(caught.value)


@pytest.mark.fault("a rank leaves early, {leave.__name__}: {error}", "an error that says why")
@pytest.mark.parametrize("error", [None, ValueError("the data set is empty")])
@pytest.mark.parametrize("leave", [at_exit, as_a_process])
def test_a_rank_that_ends_has_said_why(leave, error):
    why = "" if error is None else ": ValueError: the data set is empty"
    for text in run_ranks(3, ends, leave, error, lost=[LOST])[:2]:
        assert f": rank 2 has ended{why}; rank" in text


def knows_itself_by_loopback(rank: int) -> list[str]:
    """What is logged where rank 1 is on another host, whose own name leads to 127.0.0.1 there."""
    records = logged()
    if rank == 1:
        alarm.own_machine = lambda: "another"
        begin = Lifeline.__init__

        def elsewhere(lifeline: Lifeline, host: str) -> None:
            begin(lifeline, host)
            lifeline.address = (host, 1)  # nobody listens there, here

        Lifeline.__init__ = elsewhere
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    time.sleep(2.5)
    train(model, optimizer, range(1))
    return [record.getMessage() for record in records]


def test_a_loopback_address_of_another_host_is_not_watched():
    for rank, texts in enumerate(run_ranks(3, knows_itself_by_loopback, lost=[2])[:2]):
        assert [re.sub(r" \(.*\)", "", text) for text in texts] == [
            f"rank {rank} can't watch rank {rank + 1}: if that dies, it is noticed where an "
            "exchange with it fails"
        ]


def late(rank: int) -> str:
    # With connections of its own: those of the default group break when others' time is over.
    group = dist.new_group(timeout=timedelta(seconds=60))
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    if rank == LOST:
        dist.barrier(group)  # of which the others know nothing
    with pytest.raises(RuntimeError) as caught:
        train(model, optimizer, range(1))
    return str(caught.value)


@pytest.mark.fault("call skew: another collective", "an error with its line")
def test_a_rank_that_waits_elsewhere_is_shown_with_its_line():
    for text in run_ranks(3, late, lost=[LOST], peer_timeout_s=TIMEOUT_S)[:2]:
        assert "no sign of life" not in text
        assert re.search(
            r"rank 2 is after step 1, at test_failures.py:\d+: dist.barrier\(group", text
        )


def skewed(rank: int) -> str:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    if rank == 1:
        optimizer._communicator.start_union([True])
    with pytest.raises(RuntimeError) as caught:
        train(model, optimizer, range(1))
    return str(caught.value)


@pytest.mark.fault("call skew: one exchange more", "an error on every rank")
def test_an_exchange_that_others_have_not_begun():
    for text in run_ranks(3, skewed, lost=[LOST])[:2]:  # nobody waits for an end in order
        assert "ranks have come to step() after different numbers of exchanges" in text


def dumps(rank: int, folder: str) -> None:
    os.environ["SHARDADAM_FLIGHT_DIR"] = folder
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(2))
    if rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            train(model, optimizer, range(1))


def test_the_flight_record_of_every_survivor_is_kept(tmp_path):
    run_ranks(3, dumps, str(tmp_path), lost=[LOST])
    assert len(list(tmp_path.glob("flight-*-2.json"))) == 2
    records = [json.loads(path.read_text()) for path in tmp_path.glob("flight-*-1.json")]
    assert len(records) == 2
    for record in records:
        assert "rank 2 gives no sign of life" in record["error"]
        *done, last = record["exchanges"]
        assert "in step 3 (meet): agreeing on what comes next" in last and "goes on" in last
        assert any("in step 2 (reduce): reduce-scattering gradients" in line for line in done)
        assert record["torch"] is not None


def raises(rank: int, place: str) -> str:
    """Rank 2's program ends by an exception."""
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters(), shard_grads=place == "a hook")
    train(model, optimizer, range(1))
    optimizer.zero_grad()

    def fail(*_: object) -> None:
        raise ValueError(f"in {place}")

    try:
        if rank == LOST and place == "backward":
            output = model[0](torch.zeros(16, 30))
            output.register_hook(fail)
            output.sum().backward()
        if rank == LOST and place == "a hook":
            model[4].weight.register_hook(fail)
        if place == "the closure":
            optimizer.step(fail if rank == LOST else lambda: loss_of(model, 1).backward())
        else:
            loss_of(model, 1).backward()
            optimizer.step()
    except ValueError as error:
        at_exit(error)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("no error")


@pytest.mark.fault("an exception in {place} of one rank", "an error that says which")
@pytest.mark.parametrize("place", ["backward", "a hook", "the closure"])
def test_an_exception_of_one_rank_is_told_by_all(place):
    for text in run_ranks(3, raises, place, lost=[LOST])[:2]:
        assert f": rank 2 has ended: ValueError: in {place}; rank" in text


def starves(rank: int, when: str) -> str:
    """Rank 2 has no more memory than for threads and exchanges."""
    model = torch.nn.Linear(4096, 8192)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if when == "at a step":
        optimizer = shardadam.AdamW(model.parameters())
    if rank == LOST:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 100 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        if when == "at construction":
            optimizer = shardadam.AdamW(model.parameters())
        model(torch.ones(1, 4096)).sum().backward()
        optimizer.step()
    except (RuntimeError, MemoryError, OSError) as error:
        if rank == LOST:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            at_exit(error)
        return str(error)
    raise AssertionError("no error")


@pytest.mark.fault("out of memory on one rank {when}", "an error on every rank")
@pytest.mark.parametrize("when", ["at construction", "at a step"])
def test_a_rank_without_memory(when):
    for text in run_ranks(3, starves, when, lost=[LOST])[:2]:
        assert re.search(
            r"rank 2.*(can't allocate memory|Cannot allocate memory|MemoryError)", text
        )
