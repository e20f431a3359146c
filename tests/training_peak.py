"""The peak of resident memory in training."""

import ctypes
from typing import Any

import torch
from peaks import peak_growth
from torch import nn

import shardadam

PARAM_BYTES = 4_000_000
"""Of each of 40 params."""

_M_MMAP_THRESHOLD = -3  # of malloc.h


def peak_of_training(rank: int, options: dict[str, Any]) -> int:
    """Bytes by which training 40 params, each a bucket, raises the peak of resident memory."""
    # Let glibc give back what is freed at once, so that the peak is that of what is in use.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 65536)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(40)])
    optimizer = shardadam.AdamW(model.parameters(), bucket_bytes=1 << 22, **options)

    def train() -> None:
        for _ in range(2):
            model(torch.randn(2, 1000)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return int(peak_growth(train) * 2**20)
