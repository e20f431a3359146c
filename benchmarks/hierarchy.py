"""A step of four ranks on two "hosts" joined by a slow link: flat, and by `mesh=` in both ways.

python benchmarks/hierarchy.py [--rate 1gbit] [--params 32e6] [--steps 10]

The hosts are network namespaces on this machine, with two ranks each; it takes Linux, iproute2 and
leave to make them. One run measures all ways, which take turns; the bytes are what the link's
device has counted.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys

import torch
import torch.distributed as dist
from stamp import interleaved, stamp
from torch.distributed.device_mesh import init_device_mesh
from training.measure import device_sent_bytes
from training.network import ADDRESS, Place, shaped_link

import shardadam

HOSTS, RANKS = 2, 2
PORT = "29471"
WAYS = ("flat", "mesh=", "mesh=, replicate_state=True")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Start the ranks, and print what the first one found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="1gbit", help="of the link, in tc's words")
    parser.add_argument("--params", type=float, default=32e6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device:
        _rank(int(given.params), given.steps, given.device)
        return
    with shaped_link(given.rate) as places, contextlib.ExitStack() as started:
        ranks = [
            started.enter_context(_start(places[rank // RANKS], rank))
            for rank in range(HOSTS * RANKS)
        ]
        output, _ = ranks[0].communicate()
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("a rank failed, see above")
    print(f"{given.params / 1e6:g} M params, {HOSTS} hosts of {RANKS} ranks, {given.rate} between")
    print(f"them, 1 thread a rank, medians of {given.steps} steps; {stamp()}\n")
    print("| | | MB a host sends a step | step, ms | quartiles | flat's, over it |")
    print("|---|---|---|---|---|---|")
    for line in output.splitlines():
        for row in _rows(json.loads(line)):
            print(row)


def _start(place: Place, rank: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*place.command, sys.executable, __file__, *sys.argv[1:], "--device", place.device],
        env={
            **os.environ,
            **{"RANK": str(rank), "WORLD_SIZE": str(HOSTS * RANKS), "OMP_NUM_THREADS": "1"},
            **{"MASTER_ADDR": ADDRESS.format(1), "MASTER_PORT": PORT},
            "GLOO_SOCKET_IFNAME": place.device,
        },
        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
        text=True,
    )


def _rank(numel: int, steps: int, device: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (HOSTS, RANKS), mesh_dim_names=("replicate", "shard"))
    ways = zip(WAYS, ({}, {"mesh": mesh}, {"mesh": mesh, "replicate_state": True}), strict=True)
    options = dict(ways)
    for dtype in DTYPES:
        optimizers = {way: _optimizer(numel, DTYPES[dtype], options[way]) for way in WAYS}
        sent = {way: _sent(optimizer, device) for way, optimizer in optimizers.items()}
        calls = {way: optimizer.step for way, optimizer in optimizers.items()}
        seconds = interleaved(calls, steps, before=dist.barrier)
        if dist.get_rank() == 0:
            print(json.dumps({"dtype": dtype, "sent": sent, "seconds": seconds}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _optimizer(numel: int, dtype: torch.dtype, options: dict) -> shardadam.AdamW:
    """Of params of 250,000 elements, which have gradients."""
    params = [
        torch.nn.Parameter(torch.randn(250_000, dtype=dtype)) for _ in range(numel // 250_000)
    ]
    for param in params:
        param.grad = torch.randn(param.shape, dtype=dtype)
    return shardadam.AdamW(params, **options)


def _sent(optimizer: shardadam.AdamW, device: str) -> float:
    """Bytes that a host's device sends in a step, with TCP's own."""
    optimizer.step()
    dist.barrier()
    before = device_sent_bytes(device)
    dist.barrier()
    optimizer.step()
    dist.barrier()
    return device_sent_bytes(device) - before


def _rows(found: dict) -> list[str]:
    rows = []
    flat = statistics.median(found["seconds"][WAYS[0]])
    for way in WAYS:
        seconds = found["seconds"][way]
        low, middle, high = (1e3 * quartile for quartile in statistics.quantiles(seconds, n=4))
        rows.append(
            f"| {found['dtype']} | {way} | {found['sent'][way] / 1e6:.1f} | {middle:.0f} | "
            f"{low:.0f} to {high:.0f} | {1e3 * flat / middle:.2f} |"
        )
    return rows


if __name__ == "__main__":
    main()
