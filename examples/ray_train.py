"""Ray Train runs the ranks: a worker dies, Ray starts new ones, training goes on to the last bit.

python examples/ray_train.py

Trains a small GPT on Python's own sources on two workers twice: undisturbed, and with a worker that
is killed midway. Both end with the same params.
"""

import argparse
import hashlib
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
import torch.nn.functional as F
from corpus import standard_library
from gpt import GPT
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

import shardadam
from shardadam import checkpoint


def train_on_a_worker(config: dict[str, Any]) -> None:
    """One rank's loop. Ray has made the process group; there is no wrapper around the model."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(0)
    model = GPT(layers=1, width=64, context=64, table_rows=1024)
    optimizer = shardadam.AdamW(model.named_parameters(), lr=1e-3, shard_grads=True)
    folder = Path(config["folder"])  # that all workers and those after them can see
    start = 0
    if any(folder.iterdir()):
        start = checkpoint.load(folder, optimizer=optimizer, model=model).step
    corpus = standard_library()
    for step in range(start, config["steps"]):
        if step == config["dies_at"] and not start and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        inputs, targets = corpus.batch(0, step, 16, 64, rank, world_size)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % config["save_every"] == 0:
            checkpoint.save(folder, step=step + 1, optimizer=optimizer, model=model, keep=2)
    digest = hashlib.sha256()
    for param in model.parameters():
        digest.update(param.detach().numpy().tobytes())
    result = {"loss": loss.item(), "started_at": start, "params": digest.hexdigest()[:16]}
    ray.train.report(result)
    if rank == 0:
        (folder.parent / "result.json").write_text(json.dumps(result))


def main() -> None:
    """Run both, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save-every", type=int, default=10)
    args = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    results = []
    for dies_at in (None, args.steps - args.save_every // 2):
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(f"{folder}/checkpoints")
            TorchTrainer(
                train_on_a_worker,
                train_loop_config={
                    "steps": args.steps,
                    "save_every": args.save_every,
                    "dies_at": dies_at,
                    "folder": f"{folder}/checkpoints",
                },
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=2),
                run_config=RunConfig(
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=1),
                ),
            ).fit()
            results.append(json.loads(Path(folder, "result.json").read_text()))
        told = "undisturbed" if dies_at is None else f"worker 1 killed at step {dies_at}"
        print(
            f"{told}: last started at step {results[-1]['started_at']}, "
            f"loss {results[-1]['loss']:.4f}, params {results[-1]['params']}",
            flush=True,
        )
    ray.shutdown()
    if results[0]["params"] != results[1]["params"]:
        raise SystemExit("the params differ")


if __name__ == "__main__":
    main()
