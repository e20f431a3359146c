"""Ranks that share one GPU: the params they arrive at, against ranks on the CPU."""

import contextlib
import multiprocessing
import os
import tempfile
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardadam
from gpu.equal import same_bits
from gpu.report import Clock, Report

CLAIM = "ranks equal ranks on the CPU"
GROUPS = (("gloo", 2), ("gloo", 3), ("nccl", 2))
SHAPES = [(1,), (129,), (64, 65), (8193,), (100, 301)]
STEPS = 4
CASES: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {}),
    (torch.float32, {"max_grad_norm": 0.5}),
    (torch.float32, {"shard_grads": True}),
    (torch.bfloat16, {"max_grad_norm": 0.5}),
    (torch.bfloat16, {"shard_grads": True}),
)


def check(report: Report, device: torch.device, clock: Clock, quick: bool) -> None:
    """All groups at once: most of the time goes into starting processes."""
    groups = GROUPS[:1] if quick else GROUPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(
                target=_rank_main,
                args=(backend, world_size, rank, str(device), folder, clock.left),
                daemon=True,
            )
            for backend, world_size in groups
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(clock.left, 0))
            if process.is_alive():
                process.kill()
                process.join()
        for backend, world_size in groups:
            _judge(report, backend, world_size, folder, late=clock.left <= 0)


def _judge(report: Report, backend: str, world_size: int, folder: Path, late: bool) -> None:
    claim = f"{world_size} {CLAIM} ({backend})"
    failures = [
        path.read_text()
        for rank in range(world_size)
        if (path := _path(folder, backend, world_size, rank, "failure")).exists()
    ]
    begun = all(
        _path(folder, backend, world_size, rank, "begun").exists() for rank in range(world_size)
    )
    wrong = []
    if not failures:
        for rank in range(world_size):
            paths = [
                _path(folder, backend, world_size, rank, "device"),
                _path(folder, "gloo", world_size, rank, "host"),
            ]
            missing = [path.name for path in paths if not path.exists()]
            if missing:
                failures.append(f"rank {rank} died or hung: it left no {missing[0]}")
                continue
            found, expected = map(torch.load, paths)
            wrong += [
                f"param {index} of rank {rank}"
                for index, (left, right) in enumerate(zip(found, expected, strict=True))
                if not same_bits(left, right)
            ]
    last = [failure.strip().splitlines()[-1] for failure in failures]
    report.numbers[f"ranks {backend} {world_size}"] = {"failures": failures, "wrong": wrong}
    if backend == "nccl" and not dist.is_nccl_available():
        report.skip(claim, "this torch has no NCCL")
    elif backend == "nccl" and any("Duplicate GPU" in failure for failure in failures):
        report.skip(claim, "NCCL refuses two ranks on one GPU, and there is only one")
    elif late and not begun:
        report.skip(claim, "time was up before all had started")
    else:
        detail = f"{len(CASES)} trainings of {STEPS} steps"
        detail += f", wrong: {wrong[:4]}" if wrong else ""
        detail += f", failed: {last[0]}" if last else ""
        report.judge(not failures and not wrong, claim, detail)


def _path(folder: Path, backend: str, world_size: int, rank: int, what: str) -> Path:
    return folder / f"{backend}-{world_size}-{rank}-{what}"


def _rank_main(
    backend: str, world_size: int, rank: int, device_name: str, folder: Path, seconds: float
) -> None:
    # A rank that waits for a dead one must not outlive the check.
    threading.Timer(max(seconds, 1), os._exit, (1,)).start()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    torch.set_num_threads(1)
    try:
        device = torch.device(device_name)
        if backend == "nccl" and torch.cuda.device_count() >= world_size:
            device = torch.device("cuda", rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            init_method=f"file://{_path(folder, backend, world_size, 0, 'store')}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=max(seconds, 1)),
        )
        _path(folder, backend, world_size, rank, "begun").touch()
        torch.save(_train(rank, device), _path(folder, backend, world_size, rank, "device"))
        if backend == "gloo":
            host = _train(rank, torch.device("cpu"))
            torch.save(host, _path(folder, backend, world_size, rank, "host"))
    except BaseException:
        _path(folder, backend, world_size, rank, "failure").write_text(traceback.format_exc())
        os._exit(1)
    with contextlib.suppress(RuntimeError):
        dist.barrier()  # a rank that leaves closes its connections under the others' last exchange
    os._exit(0)


def _train(rank: int, device: torch.device) -> list[Tensor]:
    """The params after `STEPS` steps of every case."""
    results = []
    for dtype, options in CASES:
        generator = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
            for shape in SHAPES
        ]
        optimizer = shardadam.AdamW(params, lr=1e-2, bucket_bytes=40_000, **options)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(100 * step + rank)
            # A loss whose gradients are these numbers, on every device.
            grads = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
            losses = [
                (param * grad).sum().float() for param, grad in zip(params, grads, strict=True)
            ]
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results += [param.detach().cpu() for param in params]
    return results
