"""What the doctor measures between ranks: clocks, and how fast a step's collectives are."""

import statistics
import time
from collections.abc import Callable

import torch

from shardadam.cli.findings import Finding
from shardadam.cli.summary import size
from shardadam.collectives import Communicator
from shardadam.options import DEFAULT_BUCKET_BYTES

_ROUNDS = 9
_CLOCKS_DIFFER_S = 1.0
_SLOW = 100e6
"""Bytes per second: less than a network of 1 Gb/s gives."""


def look_at_clocks(ranks: Communicator) -> list[Finding]:
    """How far the ranks' clocks are apart: all leave an all-reduce at nearly the same time."""
    stamps, spans = [], []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        ranks.agree([0])
        spans.append(time.perf_counter() - begin)
        stamps.append(time.time())
    everybody = ranks.exchange((stamps, statistics.median(spans)))
    zeroth = everybody[0][0]
    offsets = [
        statistics.median(own - other for own, other in zip(theirs, zeroth, strict=True))
        for theirs, _ in everybody
    ]
    apart = max(offsets) - min(offsets)
    bound = max(span for _, span in everybody)
    told = f"{apart * 1e3:.1f} ms apart, within the {bound * 1e3:.1f} ms that an all-reduce takes"
    if apart <= bound:
        return [Finding("clocks", "ok", told)]
    first, last = offsets.index(max(offsets)), offsets.index(min(offsets))
    told = f"rank {first}'s is {apart:.3f} s ahead of rank {last}'s (± {bound * 1e3:.1f} ms)"
    if apart < _CLOCKS_DIFFER_S:
        return [Finding("clocks", "ok", told)]
    advice = "times in the ranks' logs can't be compared: synchronise the hosts by NTP (chronyd)"
    return [Finding("clocks", "warning", told, advice)]


def look_at_bandwidth(ranks: Communicator) -> list[Finding]:
    """What the two exchanges of a step take for one bucket of the default size."""
    numel = DEFAULT_BUCKET_BYTES // 4 // ranks.world_size * ranks.world_size
    flat = torch.ones(numel, device=ranks.device)
    mean = torch.empty(numel // ranks.world_size, device=ranks.device)
    sent = flat.nbytes * (ranks.world_size - 1) // ranks.world_size
    findings = []
    for name, exchange in (
        ("reduce", lambda: ranks.start_reduce_scatter_mean(flat, mean).wait()),
        ("gather", lambda: ranks.start_all_gather(flat).wait()),
    ):
        seconds = max(ranks.exchange(_median_time(exchange, ranks)))
        rate = sent / seconds
        told = (
            f"{seconds * 1e3:.1f} ms for {size(flat.nbytes)} over {ranks.backend}: each rank sends "
            f"{rate / 1e9:.2f} GB/s"
        )
        if rate >= _SLOW:
            findings.append(Finding(name, "ok", told))
        else:
            advice = "slower than 1 Gb/s: is this the right interface? See network above"
            findings.append(Finding(name, "warning", told, advice))
    return findings


def _median_time(exchange: Callable[[], object], ranks: Communicator) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        ranks.agree([0])  # begin together
        begin = time.perf_counter()
        exchange()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])  # the first ones make buffers and connections
