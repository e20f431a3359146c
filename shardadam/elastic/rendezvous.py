"""How ranks find each other, also when they have been started again."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def init_process_group(
    backend: str | None = None, *, timeout: timedelta | None = None, **options: Any
) -> None:
    """As torch.distributed's, from the environment that a launcher sets; without one, nothing.

    torchrun's restarts keep the agent's store, in which torch finds the addresses that ranks of
    earlier attempts have left: they wait for the dead. Here every attempt has keys of its own.

    Args:
        backend: as in torch.
        timeout: after which a collective is given up, because a rank hangs; torch's is 30 minutes.
        options: others of torch's.
    """
    if "WORLD_SIZE" not in os.environ:
        return  # one process, which has nobody to find
    limit: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, **limit, **options)
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, world_size, is_master=False, **limit
    )
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt {attempt}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        **limit,
        **options,
    )
