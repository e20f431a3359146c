"""In DeepSpeed's place: goes on with what DeepSpeed has trained and saved, by shardadam alone.

torchrun --standalone --nproc-per-node 2 examples/deepspeed_zero.py --save deepspeed_run
python -m shardadam ckpt convert deepspeed_run imported --to ours
torchrun --standalone --nproc-per-node 2 examples/from_deepspeed.py imported

The optimizer is what `python -m shardadam deepspeed examples/ds_config.json` prints.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus import standard_library
from gpt import GPT

import shardadam
from shardadam import checkpoint


def main() -> None:
    """Train on from where the checkpoint is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("imported", type=Path, help="the converted checkpoint")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = GPT(layers=1, width=64, context=64)
    model = model.to(torch.bfloat16)  # bf16.enabled = True
    optimizer = shardadam.AdamW(
        model.named_parameters(),
        lr=0.001,  # optimizer.params.lr = 0.001
        betas=(0.9, 0.999),  # optimizer.params.betas = [0.9, 0.999]
        weight_decay=0.01,  # optimizer.params.weight_decay = 0.01
        shard_grads=True,  # zero_optimization.stage = 2
        max_grad_norm=1.0,  # gradient_clipping = 1.0
    )
    first = checkpoint.load(args.imported, model=model, optimizer=optimizer, rng=False).step
    corpus = standard_library()
    for step in range(first, first + args.steps):
        inputs, targets = corpus.batch(0, step, 8 * world_size, 64, rank, world_size)
        loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == first or step == first + args.steps - 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step + 1}: loss {mean.item() / world_size:.4f} nats per byte")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
