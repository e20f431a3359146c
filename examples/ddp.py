"""DistributedDataParallel keeps the model, shardadam takes the reduction: three lines.

torchrun --standalone --nproc-per-node 2 examples/ddp.py

Trains a small GPT on Python's own sources twice, under DDP with torch's AdamW and with shardadam's,
and prints losses, state and the bytes that the ranks have sent, as the network device counted them.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus import standard_library
from gpt import GPT
from torch.nn.parallel import DistributedDataParallel

import shardadam
from shardadam.integrations import ddp


def main() -> None:
    """Train both, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    corpus = standard_library()
    for name in ("torch.optim.AdamW", "shardadam.AdamW"):
        torch.manual_seed(0)
        model = DistributedDataParallel(GPT(layers=1, width=64, context=64))
        if name == "shardadam.AdamW":
            optimizer = shardadam.AdamW(model.parameters(), lr=1e-3)
            model.register_comm_hook(optimizer, ddp.reduce_scatter)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        dist.barrier()
        before = sent_bytes()
        for step in range(args.steps):
            inputs, targets = corpus.batch(0, step, 8 * world_size, 64, rank, world_size)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        state = sum(
            value.nbytes
            for entry in optimizer.state.values()
            for value in entry.values()
            if isinstance(value, torch.Tensor)
        )
        if rank == 0:
            sent = f", {(sent_bytes() - before) / 1e6:,.0f} MB sent by all"
            print(
                f"{name:<18} loss {loss.item() / world_size:.4f} nats per byte after {args.steps} "
                f"steps, {state / 1e6:.1f} MB of state on rank 0{sent}"
            )
    dist.destroy_process_group()


def sent_bytes() -> int:
    """Of the loopback device, by all ranks of this machine; 0 where nobody counts."""
    counter = Path("/sys/class/net/lo/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


if __name__ == "__main__":
    main()
