"""DeepSpeed shards, shardadam updates: its AdamW in the place of DeepSpeed's, under any ZeRO stage.

torchrun --standalone --nproc-per-node 2 examples/deepspeed_zero.py --stage 2

Trains a small GPT on Python's own sources by ds_config.json, with the optimizer that DeepSpeed
makes of it and with shardadam's, and prints losses. Half-way DeepSpeed saves, a new engine goes on.
"""

import argparse
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus import Corpus, standard_library
from gpt import GPT

from shardadam.integrations.deepspeed import AdamW

CONFIG = Path(__file__).with_name("ds_config.json")


def main() -> None:
    """Train with both, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stage", type=int, choices=range(4), default=2, help="of ZeRO")
    parser.add_argument("--save", type=Path, help="where the last checkpoint of DeepSpeed's is put")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if not torch.cuda.is_available():
        # DeepSpeed's collectives in shared memory would be compiled first, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    config = json.loads(CONFIG.read_text())
    config["zero_optimization"]["stage"] = args.stage
    corpus = standard_library()
    half = args.steps // 2
    for name in ("DeepSpeed's", "shardadam's"):
        engine = engine_for(name, config)
        train(engine, corpus, range(half))
        folders = [tempfile.mkdtemp(prefix="deepspeed_zero-") if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folders)
        engine.save_checkpoint(folders[0])
        engine = engine_for(name, config)
        engine.load_checkpoint(folders[0])
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folders[0])
        loss = train(engine, corpus, range(half, args.steps))
        if args.save is not None and name == "DeepSpeed's":
            engine.save_checkpoint(args.save)
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            print(
                f"ZeRO-{args.stage}, {name:<11} AdamW: loss "
                f"{loss.item() / dist.get_world_size():.4f} nats per byte after {args.steps} steps"
            )
    dist.destroy_process_group()


def engine_for(name: str, config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """The same model at every call."""
    torch.manual_seed(0)
    model = GPT(layers=1, width=64, context=64)
    optimizer = None
    if name == "shardadam's":
        chosen = config["optimizer"]["params"]
        optimizer = AdamW(model.parameters(), lr=chosen["lr"], weight_decay=chosen["weight_decay"])
    return deepspeed.initialize(
        model=model, model_parameters=model.parameters(), optimizer=optimizer, config=config
    )[0]


def train(engine: deepspeed.DeepSpeedEngine, corpus: Corpus, steps: range) -> torch.Tensor:
    """The last step's loss on this rank's part of the batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = engine.train_micro_batch_size_per_gpu() * world_size
    for step in steps:
        inputs, targets = corpus.batch(0, step, size, 64, rank, world_size)
        inputs, targets = inputs.to(engine.device), targets.to(engine.device)
        loss = F.cross_entropy(engine(inputs).float().flatten(0, 1), targets.flatten())
        engine.backward(loss)
        engine.step()
    return loss.detach()


if __name__ == "__main__":
    main()
