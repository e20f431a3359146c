"""Hosts on one machine: network namespaces joined by a cable, each with a name of its own."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launched import ENVIRONMENT, ROOT


@dataclasses.dataclass(frozen=True)
class Host:
    """One that can be reached at ``address``; its device is eth0."""

    name: str
    address: str
    namespace: str
    names: Path
    """Its /etc/hosts."""

    def command(self, *words: str | Path) -> list[str | Path]:
        """What runs ``words`` there."""
        inside = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", inside]
        return [*enter, "sh", self.name, self.names, *words]

    def start(self, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Run ``words`` there, in this folder and `ENVIRONMENT` with what is given."""
        return subprocess.Popen(
            self.command(*words),
            env=ENVIRONMENT | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pids(self) -> list[int]:
        """Of all that runs there."""
        within = ["ip", "netns", "pids", self.namespace]
        return [*map(int, subprocess.check_output(within, text=True).split())]


@contextlib.contextmanager
def two_hosts(
    folder: Path, names: Sequence[str] = ("node-1", "node-2"), *, service: str | None = None
) -> Iterator[list[Host]]:
    """Two hosts that know each other by name, and themselves by 127.0.1.1, as Debian has it.

    With a ``service`` as Kubernetes has it: pods, which know each other, and themselves, by
    NAME.SERVICE.
    """
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and ip of iproute2")
    addresses = [f"10.77.0.{number}" for number, _ in enumerate(names, 1)]
    hosts = [
        Host(name, address, f"shardadam-{os.getpid()}-{name}", folder / f"hosts of {name}")
        for name, address in zip(names, addresses, strict=True)
    ]
    for host in hosts:
        lines = ["127.0.0.1 localhost"]
        if service is None:
            lines += [f"127.0.1.1 {host.name}"]
            lines += [f"{other.address} {other.name}" for other in hosts if other is not host]
        else:
            lines += [f"{other.address} {other.name}.{service}" for other in hosts]
            lines += [f"{host.address} {host.name}"]
        host.names.write_text("\n".join([*lines, ""]))
    first, second = (host.namespace for host in hosts)
    try:
        for namespace in (first, second):
            ip("netns", "add", namespace)
        cable = f"link add eth0 netns {first} type veth peer eth0 netns {second}"
        ip(*cable.split())
        for host in hosts:
            inside = ("-n", host.namespace)
            ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
            ip(*inside, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    else:
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError, ProcessLookupError):
                for pid in host.pids():
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
