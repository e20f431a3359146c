"""Where the state is, and who updates it there."""

from functools import partial
from typing import NamedTuple

import torch

from shardadam.file_slot import FileSlot
from shardadam.host_slot import HostSlot
from shardadam.kernels import Backend, OnHost, backend_for
from shardadam.options import Options
from shardadam.state_file import StateFile
from shardadam.storage import DeviceMemory, PinnedMemory, StateMemory
from shardadam.streaming import Streamed
from shardadam.updates import InPlace, Updater


class Place(NamedTuple):
    """Of one optimizer: what computes, where state is allocated, and how it is updated there."""

    backend: Backend
    memory: StateMemory
    updater: Updater


def place_for_state(options: Options, device: torch.device, backend: Backend) -> Place:
    """The place that ``options`` ask for; ``backend`` is that of the params' ``device``."""
    if options.directory is not None:
        file = StateFile(options.directory)
        in_one_thread = backend_for(device, threads=1)
        return Place(backend, file, Streamed(partial(FileSlot, file), in_one_thread))
    if options.offload == "cpu":
        on_host = OnHost(backend_for(torch.device("cpu"), threads=1), backend)
        return Place(on_host, PinnedMemory(), Streamed(partial(HostSlot, device), on_host))
    return Place(backend, DeviceMemory(device), InPlace(backend))
