"""How ranks find each other, also when they have been started again."""

import os
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from shardadam.lifeline import own_address

_KEY = "shardadam's store"
_WAIT = timedelta(minutes=5)
_TRY = timedelta(seconds=5)
# Not SLURM_NTASKS, which a batch script has too, before any srun.
_SEVERAL = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE"}


def init_process_group(
    backend: str | None = None, *, timeout: timedelta | None = None, **options: Any
) -> None:
    """As torch.distributed's, from the environment that a launcher sets; without one, nothing.

    torchrun's agents share one store for all attempts, in which torch finds the addresses that
    ranks of earlier ones have left: they wait for the dead. Agents of several hosts don't count
    attempts alike either. So here rank 0 opens a store for each, and says where in the shared one.

    Args:
        backend: as in torch.
        timeout: after which a collective is given up, because a rank hangs; torch's is 30 minutes,
            10 with NCCL.
        options: others of torch's.

    Raises:
        RuntimeError: rank 0 did not come within five minutes; or srun or mpirun has started several
            processes without these variables.
    """
    if "WORLD_SIZE" not in os.environ:
        _refuse_several()
        return  # one process, which has nobody to find
    limit: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, **limit, **options)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store_of_this_attempt(rank, world_size)
    store.set_timeout(timeout or _WAIT)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, **limit, **options
    )


def _refuse_several() -> None:
    """Each would train alone, and save into the same folder."""
    for launcher, name in _SEVERAL.items():
        if int(os.environ.get(name, "1")) > 1:
            raise RuntimeError(
                f"{launcher} has started {os.environ[name]} processes ({name}) without WORLD_SIZE: "
                "expected them to be torchrun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in "
                f"their environment, as in launch/. For a run in each, unset {name}"
            )


def _store_of_this_attempt(rank: int, world_size: int) -> Any:
    """Opened by rank 0 on a port of its own; that of an attempt whose ranks are dead is closed."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = _connect(address, port, _WAIT)
    if rank == 0:
        own = own_address(address, port)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            own, 0, world_size, is_master=True, wait_for_workers=False
        )
        mark = secrets.token_hex(8)
        store.set("mark", mark)
        shared.set(_KEY, f"{own} {store.port} {mark}")
        return store
    deadline = time.monotonic() + _WAIT.total_seconds()
    while time.monotonic() < deadline:
        try:
            there, opened, mark = shared.get(_KEY).decode().split()
        except dist.DistStoreError:  # it has waited as long as it may
            break
        try:
            store = _connect(there, int(opened), _TRY)
            if store.get("mark").decode() == mark:
                return store
        except RuntimeError:  # it is closed, or somebody else's
            time.sleep(0.2)
    raise RuntimeError(f"rank {rank} of {world_size}: rank 0 did not come within {_WAIT}")


def _connect(address: str, port: int, timeout: timedelta) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=False, wait_for_workers=False, timeout=timeout
    )
