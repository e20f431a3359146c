"""What exact_microbatches costs: one step with and without, in CPU time and bytes sent.

torchrun --standalone --nproc-per-node 2 benchmarks/microbatches.py [--each 4] [--repeats 9]
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from stamp import interleaved, stamp, table
from torch import nn

import shardadam

WIDTH, LAYERS, SAMPLES = 1024, 12, 128
PLAIN = "gradients accumulated by torch"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=4, help="microbatches on each rank")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    number = args.each * dist.get_world_size()
    optimizers = {PLAIN: None, f"exact_microbatches={number}": number}
    steps: dict[str, Callable[[], None]] = {}
    sent: dict[str, Callable[[], int]] = {}
    for name, microbatches in optimizers.items():
        steps[name], sent[name] = _step(microbatches, args.each)
    before = {name: bytes_() for name, bytes_ in sent.items()}
    seconds = interleaved(steps, args.repeats, time.process_time, dist.barrier)
    if dist.get_rank() == 0:
        numel = LAYERS * (WIDTH + 1) * WIDTH
        print(
            f"\n{numel / 1e6:.1f} M fp32 params, {args.each} microbatches of {SAMPLES} samples on "
            f"each of {dist.get_world_size()} gloo ranks, {stamp()}\n"
        )
        print(table(seconds, PLAIN), "\n")
        for name, bytes_ in sent.items():
            each = (bytes_() - before[name]) / (args.repeats + 1)  # interleaved() warms up
            print(f"{name}: {each / 1e6:.1f} MB sent per step by a rank")
    dist.destroy_process_group()


def _step(microbatches: int | None, each: int) -> tuple[Callable[[], None], Callable[[], int]]:
    model = nn.Sequential(
        *[layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    )
    optimizer = shardadam.AdamW(model.parameters(), exact_microbatches=microbatches)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(each):
            loss = model(torch.randn(SAMPLES, WIDTH)).square().mean()
            (loss / each if microbatches is None else loss).backward()
        optimizer.step()

    return step, lambda: sum(optimizer.stats()["sent_bytes"].values())


if __name__ == "__main__":
    main()
