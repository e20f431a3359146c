"""The alarm outlives no process group, no false alarm and no port scanner."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

import shardadam
from models import mlp, train
from ranks import logged, run_ranks
from shardadam.alarm import Alarm
from shardadam.lifeline import Lifeline

LOST = 2  # of three ranks


def failure(model, optimizer) -> str:
    with pytest.raises(RuntimeError) as caught:
        train(model, optimizer, range(1))
    return str(caught.value)


def destroys(rank: int) -> None:
    threads = threading.active_count()
    records, model = logged(), mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    store = dist.distributed_c10d._get_default_store()
    port = store.underlying_store.port
    assert threading.active_count() == threads + 2
    del optimizer, store
    dist.barrier()
    dist.destroy_process_group()
    assert threading.active_count() == threads
    if rank == 0:  # else the ranks of a next group would read there where those of this one were
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    time.sleep(1.5)  # longer than an alarm takes
    assert [record.getMessage() for record in records] == []


def test_a_destroyed_process_group_leaves_no_store_and_no_thread():
    run_ranks(3, destroys, lost=[LOST])


def test_torch_keeps_no_process_group_that_our_optimizer_was_made_in():
    program = """
import weakref, torch, torch.distributed as dist, shardadam
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
shardadam.AdamW([torch.zeros(3, requires_grad=True)])
world = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
assert world() is None
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def leaves_the_group(rank: int) -> str:
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    if rank == LOST:
        del optimizer
        dist.destroy_process_group()
        time.sleep(60)
    return failure(model, optimizer)


@pytest.mark.fault("a rank destroys the process group early", "an error that says so")
def test_a_rank_that_destroys_the_group_has_said_so():
    for text in run_ranks(3, leaves_the_group, lost=[LOST])[:2]:
        # Its connections break before it can say so: it may have been asked first.
        assert re.search(
            r"rank 2 (has destroyed the process group"
            r"|is before any exchange, at test_alarm.py:\d+: dist.destroy_process_group\(\))",
            text,
        )


def started_again(rank: int) -> str:
    # As agents of torchrun count where one of them has joined anew.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(rank < LOST))
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    if rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    return failure(model, optimizer)


def test_hosts_may_count_restarts_otherwise():
    for text in run_ranks(3, started_again, lost=[LOST])[:2]:
        assert "rank 2 gives no sign of life; rank" in text


def blinks(rank: int) -> tuple[list[str], str]:
    """Rank 0's connection to rank 1 breaks, as in a pause of its machine; rank 2 dies later."""
    records, model = logged(), mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    time.sleep(0.5)  # until all are watched
    if rank == 0:
        Alarm.of_world()._lifeline._watched.shutdown(socket.SHUT_RDWR)
    time.sleep(2.5)
    logs = [record.getMessage() for record in records]
    train(model, optimizer, range(1, 2))
    if rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    return logs, failure(model, optimizer)


@pytest.mark.fault("a false alarm, then kill -9", "an error that names it")
def test_a_false_alarm_does_not_hide_a_death():
    for (log,), text in run_ranks(3, blinks, lost=[LOST])[:2]:
        assert "no sign of life" not in log
        assert "rank 2 gives no sign of life; rank" in text and "that was" not in text


def dies_before(rank: int) -> str:
    dist.barrier()
    if rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        shardadam.AdamW(mlp().parameters())
    return str(caught.value)


@pytest.mark.fault("kill -9 before the first optimizer", "an error that names it")
def test_a_rank_that_dies_before_its_optimizer():
    for text in run_ranks(3, dies_before, lost=[LOST])[:2]:
        assert "rank 2 has made no optimizer, and may be dead or alive; rank" in text


def test_a_refused_connection_is_no_death():
    """The rank has ended before it was watched; or a firewall refuses."""
    watching, ended = Lifeline("127.0.0.1"), Lifeline("127.0.0.1")
    ended.end()
    found = iter([ended.address, None])
    watching.watch(lambda: next(found), lost=pytest.fail)
    with pytest.raises(ConnectionRefusedError):
        watching.watch(lambda: ended.address, lost=pytest.fail)
    watching.end()


def test_a_farewell_reaches_the_watcher_behind_a_port_scanner():
    watching, watched = Lifeline("127.0.0.1"), Lifeline("127.0.0.1")
    with socket.create_connection(watched.address):
        lost = []
        watcher = threading.Thread(
            target=watching.watch, args=(lambda: watched.address, lambda: lost.append(True))
        )
        watcher.start()
        time.sleep(0.5)
        watched.end()
        watcher.join(5.0)
    assert not watcher.is_alive() and not lost


def leaves_without_a_store(rank: int) -> None:
    threads = threading.active_count()
    model = mlp()
    optimizer = shardadam.AdamW(model.parameters())
    train(model, optimizer, range(1))
    time.sleep(0.5)  # until all are watched
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    failure(model, optimizer)
    Alarm.of_world()._leave("has ended")
    deadline = time.monotonic() + 5.0  # one that has asked may be about to end
    while threading.active_count() > threads:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_threads_end_where_the_store_has_gone():
    run_ranks(3, leaves_without_a_store, lost=[0])
