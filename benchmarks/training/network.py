"""Network namespaces: devices that nobody else uses, so that their counters can be believed.

All ranks share a namespace's loopback device; or two ranks get one each, joined by a link of a
given rate. Namespaces end with the processes that hold them: there is nothing to clean up. Where
the user isn't root, they are made in a user namespace, if the system lets one.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

ADDRESS = "10.77.0.{}"
DEVICE = "veth0"


class Unavailable(RuntimeError):
    """This system or user can't have namespaces or shaped links; says why."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs: what its command begins with, its device, and whose counters these are."""

    command: tuple[str, ...] = ()
    device: str = "lo"
    counts: bool = False
    """The device is used by these ranks only."""
    shared: bool = True
    """All the ranks send through it."""


@contextlib.contextmanager
def loopback(world_size: int) -> Iterator[list[Place]]:
    """A loopback device for these ranks alone."""
    with _namespace(()) as enter:
        yield [Place(enter, "lo", counts=True)] * world_size


@contextlib.contextmanager
def shaped_link(rate: str) -> Iterator[list[Place]]:
    """Two places joined by a link whose both ends send at most at ``rate``, in tc's words."""
    with _namespace(()) as first, _namespace(first) as second:
        holder = second[1].partition("=")[2]
        _run(first, f"ip link add {DEVICE} type veth peer name {DEVICE} netns {holder}")
        for number, enter in enumerate((first, second), start=1):
            _run(enter, f"ip address add {ADDRESS.format(number)}/24 dev {DEVICE}")
            _run(enter, f"ip link set {DEVICE} up")
            _run(enter, f"tc qdisc add dev {DEVICE} root tbf rate {rate} burst 256kb latency 100ms")
            if "tbf" not in _run(enter, f"tc qdisc show dev {DEVICE}"):
                raise Unavailable(f"tc took the rate of {DEVICE} but does not show it")
        yield [Place(enter, DEVICE, counts=True, shared=False) for enter in (first, second)]


@contextlib.contextmanager
def _namespace(outer: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What enters a new network namespace, which lives as long as the context."""
    root = os.geteuid() == 0
    # A second one must belong to the user namespace of the first.
    user = [] if root or outer else ["--map-root-user"]
    holding = ["sh", "-c", "ip link set lo up && echo ready && read _"]
    try:
        holder = subprocess.Popen(
            [*outer, "unshare", "--net", *user, *holding],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except FileNotFoundError as error:
        raise Unavailable(f"{error.filename} is not installed") from error
    with holder:
        assert holder.stdin and holder.stdout and holder.stderr
        if holder.stdout.readline() != "ready\n":
            raise Unavailable(holder.stderr.read().strip())
        try:
            as_user = () if root else ("--user", "--preserve-credentials")
            yield ("nsenter", f"--target={holder.pid}", "--net", *as_user)
        finally:
            holder.stdin.close()


def _run(enter: tuple[str, ...], command: str) -> str:
    try:
        done = subprocess.run([*enter, *command.split()], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable(f"{error.filename} is not installed") from error
    if done.returncode:
        raise Unavailable(f"{command}: {done.stderr.strip()}")
    return done.stdout
