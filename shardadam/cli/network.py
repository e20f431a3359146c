"""By which network interface ranks would talk, and whether that can work."""

import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardadam.cli.findings import Finding
from shardadam.lifeline import own_machine

_ADDRESS_OF = 0x8915  # SIOCGIFADDR of Linux
_TOLD = 4  # of many that have the same
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is in the network.

    ``host``: its name; ``machine``: as of `own_machine`. ``chosen``: the interfaces that variables
    name. ``own``: the address that the host's name stands for, which is what gloo takes when it is
    told nothing. ``interfaces``: names and addresses. ``towards``: this rank's address as the
    master sees it.
    """

    host: str
    machine: str
    chosen: dict[str, str]
    own: str
    interfaces: dict[str, str]
    towards: str

    @classmethod
    def here(cls) -> "Place":
        """This process's."""
        host = socket.gethostname()
        return cls(
            host=host,
            machine=own_machine(),
            chosen={name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
            own=_resolved(host),
            interfaces=_interfaces(),
            towards=_towards(os.environ.get("MASTER_ADDR", "")),
        )

    def as_json(self) -> dict[str, Any]:
        """For other ranks."""
        return asdict(self)

    @property
    def suggestion(self) -> str:
        """The interface that leads to the master."""
        names = [name for name, address in self.interfaces.items() if address == self.towards]
        others = [n for n, address in self.interfaces.items() if not _loops(address)]
        return (names or others or ["the interface that `ip addr` shows"])[0]


def look_at_network(places: Mapping[int, Place], uses_nccl: bool) -> list[Finding]:
    """Whether the ranks can reach each other, before they try; ``places``: by rank."""
    machines = {place.machine for place in places.values()}
    variable = _VARIABLES[uses_nccl]
    told = (
        f"{len(places)} rank{'s' * (len(places) != 1)} on {len(machines)} "
        f"host{'s' * (len(machines) != 1)}"
    )
    findings = []
    for rank, place in places.items():
        missing = [
            f"{name}={value}"
            for name, value in place.chosen.items()
            if place.interfaces and not _names(value, place.interfaces)
        ]
        if missing:
            found = (
                f"rank {rank} on {place.host}: {missing[0]}, and there is no such interface; there "
                f"are {', '.join(place.interfaces)}"
            )
            advice = f"export {missing[0].split('=')[0]}={place.suggestion}"
            findings.append(Finding("network", "wrong", found, advice))
        elif len(machines) > 1 and _loops(_address(place, variable)) and not uses_nccl:
            how = place.chosen.get(variable)
            found = (
                f"rank {rank} on {place.host} would tell ranks on other hosts to reach it at "
                f"{_address(place, variable)}, which is their own machine: "
                + (f"{variable}={how}" if how else f"that is what {place.host} resolves to")
            )
            advice = f"on {place.host}: export {variable}={place.suggestion}"
            findings.append(Finding("network", "wrong", found, advice))
    if len(findings) > _TOLD:
        more = Finding("network", "note", f"and {len(findings) - _TOLD} more ranks like these")
        return [*findings[:_TOLD], more]
    if findings:
        return findings
    by = sorted({place.chosen.get(variable, "") for place in places.values()} - {""})
    return [Finding("network", "ok", told + (f", by {', '.join(by)}" if by else ""))]


def _address(place: Place, variable: str) -> str:
    name = place.chosen.get(variable)
    return place.interfaces.get(name, "") if name else place.own


def _names(value: str, interfaces: dict[str, str]) -> bool:
    """Whether a variable's value fits one; NCCL's is a list of beginnings, "=" an exact name."""
    if value.startswith("^"):
        return True
    wanted = [part.lstrip("=").partition(":")[0] for part in value.split(",")]
    return any(name.startswith(part) for name in interfaces for part in wanted)


def _loops(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _resolved(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        return "127.0.0.1"  # gloo falls back to it


def _towards(master: str) -> str:
    """Connecting a datagram socket sends nothing, and finds the route."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as route:
            route.connect(address)
            return str(route.getsockname()[0])
    except OSError:
        return ""


def _interfaces() -> dict[str, str]:
    """Names and IPv4 addresses ("" where there is none); empty where the system is not Linux."""
    if not Path("/sys/class/net").is_dir():
        return {}
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF, request)
                found[name] = socket.inet_ntoa(answer[20:24])
            except OSError:
                found[name] = ""
    return found
