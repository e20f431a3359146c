"""Verified checkpoints: saved whole or not at all, loaded at any world size, to the last bit.

    from shardadam import checkpoint

    checkpoint.save("run", step=1000, optimizer=optimizer, model=model, lr_scheduler=scheduler)
    found = checkpoint.load("run", optimizer=optimizer, model=model, lr_scheduler=scheduler)

Plain safetensors files and a manifest in JSON, see [Note: the format] in `manifest`: reading them
executes nothing.
"""

from shardadam.checkpoint.errors import CheckpointError, NoCheckpoint
from shardadam.checkpoint.loading import Loaded, latest, load
from shardadam.checkpoint.saving import Pending, async_save, save
from shardadam.checkpoint.verifying import Verified, verify

__all__ = [
    "CheckpointError",
    "Loaded",
    "NoCheckpoint",
    "Pending",
    "Verified",
    "async_save",
    "latest",
    "load",
    "save",
    "verify",
]
