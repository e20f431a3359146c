"""How ranks find each other, through a store that a launcher keeps for all of their attempts."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from ranks import run_ranks
from shardadam import elastic
from shardadam.elastic import rendezvous


def launched(rank: int, world_size: int, port: int) -> None:
    """The environment of a rank that torchrun has started."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def read_what_is_written_late(rank: int, port: int) -> bytes:
    dist.destroy_process_group()
    launched(rank, 2, port)
    rendezvous._TRY = timedelta(seconds=0.5)
    if rank == 0:
        launchers = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    elastic.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        time.sleep(1.5)
        store.set("unique id", "there")
        del launchers
    return store.get("unique id")


def test_ranks_wait_for_what_another_writes_later_than_the_first_try():
    """NCCL's unique id: rank 0 writes it when it comes to the first collective."""
    assert run_ranks(2, read_what_is_written_late, free_port()) == [b"there"] * 2


def come_alone(rank: int, port: int) -> str:
    launched(1, 2, port)
    rendezvous._WAIT = timedelta(seconds=1)
    launchers = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError) as error:
        elastic.init_process_group("gloo")
    del launchers
    return str(error.value)


def test_a_rank_says_that_the_first_did_not_come():
    (said,) = run_ranks(1, come_alone, free_port())
    assert said == "rank 1 of 2: rank 0 did not come within 0:00:01"


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_do_not_know_of_each_other_are_refused(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "8")
    with pytest.raises(RuntimeError, match=f"has started 8 processes .{name}. without WORLD_SIZE"):
        elastic.init_process_group("gloo")


def test_one_process_needs_no_group(monkeypatch):
    """Also in a batch script of SLURM, whose job has several tasks but no step yet."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in {
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
        "OMPI_COMM_WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    elastic.init_process_group("gloo")
    assert not dist.is_initialized()
