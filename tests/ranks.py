"""Runs a function on several real gloo ranks, forked from the test's process."""

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_S = 120.0


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = _TIMEOUT_S,
    lost: Sequence[int] = (),
    peer_timeout_s: float = 60.0,
) -> list[Any]:
    """``function(rank, *args)`` on every rank; what each returned, in order of rank.

    Those in ``lost`` are to die or to freeze: nobody waits for them, and they return nothing. The
    ranks then find each other by a TCPStore, as users' do, at which they can ask who is lost;
    otherwise by a file, which takes no port. ``peer_timeout_s`` is the process group's timeout.

    A rank's exception fails the test with that rank's traceback; a rank that neither returns nor
    raises within ``timeout_s`` is killed, and that fails the test too; shortly before, it has
    printed where it is.
    """
    # Forking is 80 times faster than spawning, and safe while the parent has used no threads
    # (conftest.py sees to it). Tensors come back as bytes, not through shared memory.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, store, sender, timeout_s, function, args),
                kwargs={"tcp": bool(lost), "peer_timeout_s": peer_timeout_s},
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        deadline = time.monotonic() + timeout_s
        results, failures = [], []
        for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
            if rank in lost:
                results.append(None)
                continue
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"no answer within {timeout_s} s")
                result, failure = pickle.loads(pipe.recv_bytes())
            except (AssertionError, EOFError) as error:
                result, failure = None, f"{type(error).__name__}: {error}"
                process.kill()
            results.append(result)
            if failure:
                failures.append(f"rank {rank} of {world_size}:\n{failure}")
        for rank, process in enumerate(processes):
            if rank in lost:
                process.kill()
            process.join()
    assert not failures, "\n".join(failures)
    return results


def _rank_main(
    rank: int,
    world_size: int,
    store: str,
    pipe: Any,
    timeout_s: float,
    function: Any,
    args: Any,
    *,
    tcp: bool,
    peer_timeout_s: float,
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * timeout_s, file=2)  # pytest has replaced sys.stderr
    result, failure = None, None
    try:
        dist.init_process_group(
            "gloo",
            store=_tcp_store(rank, store) if tcp else dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=peer_timeout_s),
        )
        result = function(rank, *args)
    except BaseException:
        failure = traceback.format_exc()
    pipe.send_bytes(pickle.dumps((result, failure)))
    pipe.close()
    if not failure and not tcp:
        # A rank that leaves closes its connections under the others' last collective.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    elif tcp and rank == 0:
        time.sleep(1.0)  # others may still ask
    # No destroy_process_group(): it would wait for ranks that have failed.
    os._exit(0)


def _tcp_store(rank: int, path: str) -> Any:
    """Opened by rank 0, whose port the others read from a file."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with open(f"{path}.new", "w") as file:
            file.write(str(store.port))
        os.rename(f"{path}.new", path)
        return store
    while not os.path.exists(path):
        time.sleep(0.01)
    with open(path) as file:
        return dist.TCPStore("127.0.0.1", int(file.read()), is_master=False)


def logged() -> list[logging.LogRecord]:
    """What shardadam logs on this rank from now on."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("shardadam").addHandler(handler)
    return records
