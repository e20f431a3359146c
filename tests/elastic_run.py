"""A training that is disturbed by what the environment says; run by torchrun.

DISTURBED: ``attempt:rank:step:signal`` of each disturbance, separated by blanks.
TIMEOUT_S: of the process group; by default a minute.
A file "slow" in the folder: while it is there, a step takes half a second.
"""

import hashlib
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import shardadam
from shardadam import elastic


def main(folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    elastic.init_process_group(
        "gloo", timeout=timedelta(seconds=int(os.environ.get("TIMEOUT_S", "60")))
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    rank = int(os.environ.get("RANK", "0"))
    disturbed = {
        tuple(each.split(":")[:3]): getattr(signal, each.split(":")[3])
        for each in os.environ.get("DISTURBED", "").split()
    }
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 30, generator=generator)
    # Gradients of few bits sum exactly, so that any number of ranks gives the same.
    targets = inputs[:, :5].abs()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 90), nn.ReLU(), nn.Dropout(0.1), nn.Linear(90, 5))
    optimizer = shardadam.AdamW(model.named_parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
    batches = elastic.Batches(len(inputs), batch_size=48)
    run = elastic.Run(folder, every=4, model=model, optimizer=optimizer, lr_scheduler=scheduler)
    started = run.step
    print(f"rank {rank} starts at step {started}", flush=True)
    for step in run.steps(steps):
        asked = disturbed.get((attempt, str(rank), str(step)))
        if asked is not None:
            os.kill(os.getpid(), asked)
        if Path(folder, "slow").exists():
            time.sleep(0.5)
        mine = batches.of(step)
        loss = F.mse_loss(model(inputs[mine]), targets[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        run.extras["losses"] = [*run.extras.get("losses", []), loss.item()]
    digest = hashlib.sha256()
    for param in model.parameters():
        digest.update(param.detach().numpy().tobytes())
    if rank == 0:
        seen = f"{digest.hexdigest()} {started} {attempt} {len(run.extras['losses'])}"
        Path(folder, "result").write_text(seen)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except elastic.Preempted as asked:
        print(asked, flush=True)
        raise
