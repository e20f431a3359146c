"""`doctor`: look at each rank alone, then at what is between them, and say what is wrong."""

import functools
import itertools
import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from shardadam.cli import machine
from shardadam.cli.between import look_at_bandwidth, look_at_clocks
from shardadam.cli.findings import Finding, looked, wrong
from shardadam.cli.launched import Launched
from shardadam.cli.network import Place, look_at_network
from shardadam.cli.numerics import self_test
from shardadam.cli.telling import DAMAGED, WHOLE, one_line

_PATIENCE = 4
"""Timeouts after which a rank ends itself: others wait for it at most thrice."""


def examine(*, as_json: bool, timeout: float) -> int:
    """Print what is found and return the exit code, the same on every rank.

    Raises:
        CommandError: as of `Launched`.
    """
    if not Launched.some():
        own = _look_here(0)
        own += looked("threads", lambda: machine.look_at_threads([machine.threads()]))
        _tell([own], [], as_json)
        return DAMAGED if wrong(own) else WHOLE
    with _watched(_PATIENCE * timeout):
        ranks = Launched(timeout)
        own = _look_here(ranks.local_rank)
    with _watched(_PATIENCE * timeout):
        said = {
            "findings": [finding.as_json() for finding in own],
            "place": Place.here().as_json(),
            "versions": machine.versions(),
            "threads": machine.threads(),
        }
        heard = ranks.share("alone", said)
        shared = _look_at_threads(heard)
        per_rank = [
            [*(Finding(**finding) for finding in heard[rank]["findings"]), *shared[rank]]
            if rank in heard
            else _silent(rank, timeout)
            for rank in range(ranks.world_size)
        ]
        between = _look_between(ranks, heard)
        if ranks.rank == 0:
            _tell(per_rank, between, as_json)
        else:
            _complain(ranks.rank, per_rank, between)
        ranks.leave()
        return DAMAGED if wrong([*between, *itertools.chain(*per_rank)]) else WHOLE


def _look_here(local_rank: int) -> list[Finding]:
    device = machine.device_of(local_rank)
    return [
        *looked("versions", machine.look_at_versions),
        *looked("backend", lambda: machine.look_at_backend(device)),
        *looked("CPU kernel", machine.look_at_twin),
        *looked("GPU", lambda: machine.look_at_gpu(device)),
        *looked("NVRTC", lambda: machine.look_at_nvrtc(device)),
        *looked("numerics", lambda: self_test(device)),
    ]


def _silent(rank: int, timeout: float) -> list[Finding]:
    found = f"nothing was heard of rank {rank} within {timeout:g} s"
    advice = "see its own output: it was not started, died, or is very slow (--timeout)"
    return [Finding("rank", "wrong", found, advice)]


_Heard = Mapping[int, dict[str, Any]]
"""Reports by rank; the silent ones have none."""


def _look_at_threads(heard: _Heard) -> dict[int, list[Finding]]:
    """For each rank, of all that are on its machine."""
    machines: dict[str, list[int]] = defaultdict(list)
    for rank, report in heard.items():
        machines[report["place"]["machine"]].append(rank)
    found: dict[int, list[Finding]] = {}
    for ranks in machines.values():
        threads = [heard[rank]["threads"] for rank in ranks]
        findings = looked("threads", functools.partial(machine.look_at_threads, threads))
        found |= dict.fromkeys(ranks, findings)
    return found


def _look_between(ranks: Launched, heard: _Heard) -> list[Finding]:
    """What can only be seen by all; nothing that would hang is tried."""
    device = machine.device_of(ranks.local_rank)
    places = {rank: Place(**report["place"]) for rank, report in heard.items()}
    findings = [
        *_same_versions({rank: report["versions"] for rank, report in heard.items()}),
        *looked("network", lambda: look_at_network(places, device.type == "cuda")),
    ]
    if len(heard) < ranks.world_size or wrong(findings):
        why = "not tried: ranks are missing or can't reach each other, see above"
        return [*findings, Finding("collectives", "note", why)]
    if ranks.world_size == 1:
        return findings  # it exchanges nothing
    try:
        with ranks.process_group(device) as communicator:
            measured = [*look_at_clocks(communicator), *look_at_bandwidth(communicator)]
    except (RuntimeError, ValueError, OSError) as error:
        advice = (
            "a rank died, or a firewall is between the hosts: ranks connect to each other at any "
            "port. Which network they take: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        )
        first = str(error).splitlines()[0]
        found = f"rank {ranks.rank} could not exchange data: {first}"
        measured = [Finding("collectives", "wrong", found, advice)]
    # A rank may have failed where others have not.
    said = ranks.share("together", [finding.as_json() for finding in measured])
    failed = [
        finding
        for rank in range(ranks.world_size)
        for finding in (
            wrong([Finding(**finding) for finding in said[rank]])
            if rank in said
            else _silent(rank, ranks.timeout)
        )
    ]
    return [*findings, *(failed or measured)]


def _same_versions(versions: Mapping[int, dict[str, str]]) -> list[Finding]:
    findings = []
    first = min(versions)
    for name, here in versions[first].items():
        others = [rank for rank, own in versions.items() if own[name] != here]
        if others:
            other = versions[others[0]][name]
            told = f"{name} is {here} on rank {first} and {other} on rank {others[0]}"
            advice = "install the same on every host: results and messages may differ"
            level = "warning" if name == "python" else "wrong"
            findings.append(Finding("versions", level, told, advice))  # type: ignore[arg-type]
    return findings


def _tell(per_rank: Sequence[Sequence[Finding]], between: Sequence[Finding], as_json: bool) -> None:
    everything = [*between, *itertools.chain(*per_rank)]
    count = len(wrong(everything))
    if as_json:
        told = {
            "ok": not count,
            "ranks": [[finding.as_json() for finding in own] for own in per_rank],
            "between": [finding.as_json() for finding in between],
        }
        print(json.dumps(told, indent=1), flush=True)
        return
    told_before: list[str] = []
    for rank, own in enumerate(per_rank):
        lines = [line for finding in own for line in finding.lines()]
        if lines == told_before:
            print(f"rank {rank}: as rank {rank - 1}")
            continue
        if len(per_rank) > 1:
            print(f"rank {rank}")
        print("\n".join(lines))
        told_before = lines
    if between:
        print("between the ranks")
        print("\n".join(line for finding in between for line in finding.lines()))
    warnings = sum(finding.level == "warning" for finding in everything)
    print()
    if count:
        print(f"{count} wrong: see WRONG above, and the arrow below each.", flush=True)
    elif warnings:
        print(f"Nothing is wrong. {warnings} could be better: see WARN.", flush=True)
    else:
        print("All is well.", flush=True)


def _complain(rank: int, per_rank: Sequence[Sequence[Finding]], between: Sequence[Finding]) -> None:
    """One line on every other rank: perhaps its output is the one that is read."""
    for where, findings in [*enumerate(per_rank), ("the ranks", between)]:
        for finding in wrong(findings):
            of = f"of rank {where}" if isinstance(where, int) else f"between {where}"
            told = f"shardadam doctor on rank {rank}: {of}: {finding.name}: {finding.found}"
            print(one_line(told), file=sys.stderr, flush=True)


@contextmanager
def _watched(seconds: float) -> Iterator[None]:
    """End this process if it takes longer, whatever it waits for."""

    def end() -> None:
        told = f"shardadam doctor: gave up after {seconds:g} s: something waits and does not end"
        print(told, file=sys.stderr, flush=True)
        os._exit(DAMAGED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
