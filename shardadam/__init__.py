"""shardadam: Adam, sharded over ranks, as a drop-in for torch.optim."""

from shardadam.adam import Adam, AdamW, NAdam

__all__ = ["Adam", "AdamW", "NAdam", "__version__"]
__version__ = "0.1.0"
