"""What looking for flipped bits costs in CPU time: steps with and without, and digests alone.

torchrun --standalone --nproc-per-node 2 benchmarks/corruption.py [--repeats 15]
"""

import argparse
import ctypes
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from stamp import interleaved, stamp, table
from torch import Tensor, nn

import shardadam
from shardadam.block_sums import block_sums, crc_of
from shardadam.replicas import bit_sum

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from gpt import GPT

EVERY = 100
NAMES = {
    "no check": {},
    "params compared at every step": {"check_replicas_every": 1},
    "check_state=True": {"check_state": True},
}


def main() -> None:
    """Print two tables for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for title, make, batch in (
        ("the demo's GPT, 8 sequences of 128 bytes a rank", lambda: GPT(2, 128, 128), _text),
        ("an MLP of 50 M params, 16 samples a rank", _mlp, _noise),
    ):
        steps = {name: _step(make(), batch, options) for name, options in NAMES.items()}
        seconds = interleaved(steps, repeats, time.process_time, dist.barrier)
        numel = sum(param.numel() for param in make().parameters())
        functions = _digests(torch.randn(numel))
        digests = interleaved(functions, repeats, time.process_time, dist.barrier)
        if dist.get_rank() == 0:
            plain = statistics.median(seconds["no check"])
            digest = statistics.median(digests["block sums, and their CRC"])
            print(f"\n{title} ({numel / 1e6:.1f} M params), {stamp()}\n")
            print(table(seconds, "no check"), "\n")
            print(table(digests, "zlib.crc32"), "\n")
            print(
                f"digest / step: {digest / plain:.1%}; with check_replicas_every={EVERY}: "
                f"{digest / plain / EVERY:.3%} of the time of training"
            )
    dist.destroy_process_group()


def _step(
    model: nn.Module, batch: Callable[[], Tensor], options: dict[str, object]
) -> Callable[[], None]:
    optimizer = shardadam.AdamW(model.parameters(), **options)

    def step() -> None:
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()

    return step


def _text() -> Tensor:
    return torch.randint(256, (8, 128))


def _noise() -> Tensor:
    return torch.randn(16, 2048)


def _mlp() -> nn.Module:
    return nn.Sequential(
        *[layer for _ in range(12) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    )


def _digests(values: Tensor) -> dict[str, Callable[[], object]]:
    memory = (ctypes.c_char * values.nbytes).from_address(values.data_ptr())
    return {
        "zlib.crc32": lambda: zlib.crc32(memory),
        "sum of the elements' bits": lambda: bit_sum(values),
        "block sums, and their CRC": lambda: crc_of(block_sums(values)),
    }


if __name__ == "__main__":
    main()
