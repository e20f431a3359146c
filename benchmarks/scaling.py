"""The cost of a step per rank at W = 1, 2, 4, 8, a formula fitted to it, and what that predicts.

python benchmarks/scaling.py [--quick]

Ranks share this machine's cores, so wall time says nothing; CPU time and bytes per rank do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from scaling_model import CLUSTERS, WAYS, Fit, Point, fit
from stamp import stamp

import shardadam

WORLD_SIZES = (1, 2, 4, 8)
BUCKETS_MIB = (1, 4, 16)
PARAMS = (8_000_000, 32_000_000)
BUCKET = 64 * 2**20  # in the predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model size, fewer steps")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        _rank(given.quick)
        return
    points, sent = [], []
    for world_size in WORLD_SIZES:
        found, bytes_ = _measure(world_size, given.quick)
        points += found
        sent += bytes_
    known = [point for point in points if point.world_size < max(WORLD_SIZES)]
    fitted = fit(known)
    print(f"\nCPU time of step() per rank, fp32, gloo, 1 thread; {stamp()}\n")
    print(_table(points, sent, fitted))
    errors = [
        abs(fitted.predict(p.params, p.world_size, p.buckets) / p.cost - 1)
        for p in points
        if p.world_size == max(WORLD_SIZES)
    ]
    print(
        f"\na = {fitted.a * 1e9:.2f} ns, b = {fitted.b * 1e9:.2f} ns a param, c = "
        f"{fitted.c * 1e6:.0f} µs a bucket, fitted without W = {max(WORLD_SIZES)}, which it misses "
        f"by {100 * statistics.median(errors):.0f} % (median), {100 * max(errors):.0f} % (most)"
    )
    print("\nPredicted: s on the wire and ms for the update a step; GB per rank of all\n")
    print(_predictions())


def _measure(world_size: int, quick: bool) -> tuple[list[Point], list[float]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world_size), __file__, "--rank"]
    output = subprocess.run(
        command + ["--quick"] * quick,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    points = [Point(r["params"], world_size, r["buckets"], r["cpu"]) for r in rows]
    return points, [row["sent"] for row in rows]


def _rank(quick: bool) -> None:
    dist.init_process_group("gloo")
    for numel in PARAMS[: 1 if quick else None]:
        for mib in BUCKETS_MIB:
            row = _cost(numel, mib * 2**20, steps=3 if quick else 10)
            costs = [torch.tensor(row["cpu"]) for _ in range(dist.get_world_size())]
            dist.all_gather(costs, torch.tensor(row["cpu"]))
            row["cpu"] = float(torch.stack(costs).mean())
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _cost(numel: int, bucket_bytes: int, steps: int) -> dict[str, float]:
    """CPU seconds and bytes of a step; params of 250,000 elements, so that any bucket has some."""
    params = [torch.nn.Parameter(torch.randn(250_000)) for _ in range(numel // 250_000)]
    optimizer = shardadam.AdamW(params, bucket_bytes=bucket_bytes)
    ranks = optimizer._communicator
    generator = torch.Generator().manual_seed(ranks.rank)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
    before = sum(ranks.sent_bytes.values())
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - start)
    return {
        "params": numel,
        "buckets": len(optimizer._buckets),
        "cpu": statistics.median(seconds),
        "sent": (sum(ranks.sent_bytes.values()) - before) / steps,
    }


def _table(points: list[Point], sent: list[float], fitted: Fit) -> str:
    lines = [
        "| params | W | buckets | CPU-ms | by the formula | sent, bytes a param | 2·4·(W−1)/W |",
        "|---|---|---|---|---|---|---|",
    ]
    for point, bytes_ in zip(points, sent, strict=True):
        world_size = point.world_size
        predicted = fitted.predict(point.params, world_size, point.buckets)
        lines.append(
            f"| {point.params / 1e6:.0f} M | {world_size} | {point.buckets} | "
            f"{1e3 * point.cost:.1f} | {1e3 * predicted:.1f} | {bytes_ / point.params:.3f} | "
            f"{8 * (world_size - 1) / world_size:.3f} |"
        )
    return "\n".join(lines)


def _predictions() -> str:
    sections = []
    for cluster in CLUSTERS:
        lines = [
            f"{cluster.name}, buckets of {BUCKET >> 20} MiB:\n",
            "| params | W | " + " | ".join(f"{way.name}: s, ms, GB" for way in WAYS) + " |",
            "|---|---|" + "---|" * len(WAYS),
        ]
        for params in (1e9, 8e9, 70e9):
            for world_size in (64, 256, 1024):
                cells = [
                    f"{way.exchange(params, world_size, cluster, BUCKET):.3g}, "
                    f"{1e3 * way.update(params, world_size, cluster):.3g}, "
                    f"{way.memory(params, world_size) / 1e9:.3g}"
                    for way in WAYS
                ]
                lines.append(f"| {params / 1e9:.0f} B | {world_size} | " + " | ".join(cells) + " |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


if __name__ == "__main__":
    main()
