"""Runs a function on several real gloo ranks, forked from the test's process."""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_S = 120.0


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = _TIMEOUT_S
) -> list[Any]:
    """``function(rank, *args)`` on every rank; what each returned, in order of rank.

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
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        deadline = time.monotonic() + timeout_s
        results, failures = [], []
        for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
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
        for process in processes:
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
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * timeout_s, file=2)  # pytest has replaced sys.stderr
    result, failure = None, None
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        result = function(rank, *args)
    except BaseException:
        failure = traceback.format_exc()
    pipe.send_bytes(pickle.dumps((result, failure)))
    pipe.close()
    if not failure:
        # A rank that leaves closes its connections under the others' last collective.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    # No destroy_process_group(): it would wait for ranks that have failed.
    os._exit(0)
