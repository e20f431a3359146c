"""What a rank runs: `python -m training.rank JOB`, a process of its own for one round.

It writes what it measured to a file: peers print to stdout.
"""

import gc
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.contenders import CONTENDERS
from training.measure import Watch, device_sent_bytes, forget_peak, peak_rss_bytes
from training.models import MODELS

WARM_UP = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """One round of one contender, as all of its ranks are told; ``folder`` is theirs."""

    contender: str
    model: str
    dtype: str
    rows: int
    iterations: int
    threads: int
    folder: str
    device: str | None
    """The network device whose counters count, or None."""

    def result(self, rank: int) -> Path:
        return Path(self.folder, f"rank{rank}.json")


@dataclass
class Measured:
    """By one rank in one round; a list has an item for every iteration."""

    wall_ms: list[float]
    cpu_ms: list[float]
    step_wall_ms: list[float]
    step_cpu_ms: list[float]
    peak_rss_bytes: int
    """Of the whole process."""
    training_peak_rss_bytes: int
    """From the first iteration on."""
    state_bytes: int
    params: int
    device_bytes: float | None
    """Sent by the device per iteration."""
    sent: dict[str, float]
    """Sent per iteration, as the optimizer counts it."""
    loss: float


def train(job: Job, rank: int, world_size: int) -> Measured:
    """Warm up, then measure."""
    model, dtype = MODELS[job.model], DTYPES[job.dtype]
    torch.manual_seed(0)
    net = model.make()
    params = sum(param.numel() for param in net.parameters())
    # Other data on every rank, the same for every contender.
    inputs, targets = model.batch(job.rows, torch.Generator().manual_seed(1 + rank))
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    training = CONTENDERS[job.contender].build(net, model.units(net), dtype)
    construction = peak_rss_bytes()
    forget_peak()
    iteration, step = Watch(), Watch()
    losses: list[torch.Tensor] = []

    def iterate() -> None:
        loss = model.loss(training.module(inputs), targets)
        training.backward(loss)
        step.time(training.step)
        training.zero_grad()
        losses.append(loss.detach())

    for _ in range(WARM_UP):
        iterate()
    gc.collect()
    step = Watch()
    dist.barrier()
    device = device_sent_bytes(job.device) if job.device else 0
    sent = training.sent()
    dist.barrier()  # nobody sends before all have read
    for _ in range(job.iterations):
        iteration.time(iterate)
    dist.barrier()
    in_device = device_sent_bytes(job.device) - device if job.device else None
    total = training.sent()
    dist.barrier()
    loss = torch.stack(losses)[-1].double()
    dist.all_reduce(loss)
    return Measured(
        iteration.wall_ms,
        iteration.cpu_ms,
        step.wall_ms,
        step.cpu_ms,
        max(construction, peak_rss_bytes()),
        peak_rss_bytes(),
        _bytes(training),
        params,
        None if in_device is None else in_device / job.iterations,
        {name: (total[name] - sent.get(name, 0)) / job.iterations for name in total},
        loss.item() / world_size,
    )


def _bytes(training: Any) -> int:
    """Shared storage counts once, views for what they show."""
    return sum(tensor.numel() * tensor.element_size() for tensor in training.state())


def main() -> None:
    """Do the job in the first argument."""
    job = Job(**json.loads(sys.argv[1]))
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    torch.set_num_threads(job.threads)
    store = f"file://{job.folder}/store"  # a TCP store would speak through the counted device
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    measured = train(job, rank, world_size)
    file = job.result(rank)
    file.with_suffix(".part").write_text(json.dumps(asdict(measured)))
    file.with_suffix(".part").rename(file)
    dist.barrier()
    # gloo's threads abort an interpreter that ends in the usual way, now and then (DDP's mostly).
    sys.stdout.flush()
    os._exit(0)


def described(job: Job, **changes: Any) -> str:
    """The argument that says it."""
    return json.dumps(asdict(replace(job, **changes)))


if __name__ == "__main__":
    main()
