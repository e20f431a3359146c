"""Notices at once that the process of another rank has died: the system then closes a connection.

Each rank listens, and is connected to by one other, in a ring. Nothing is sent but a farewell, so
it costs nothing. A process that is frozen keeps its connections; a host that is gone or cut off is
noticed by the system's keep-alive, within 15 s.
"""

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 5}  # 15 s in all
_FAREWELL = b"."
_CONNECT_WITHIN_S = 10.0


class Lifeline:
    """One rank's.

    Args:
        host: this host's address, by which the others reach it.
    """

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        self.address: tuple[str, int] = (host, self._listener.getsockname()[1])
        self._watched: socket.socket | None = None
        self._ending = threading.Event()
        itself = weakref.ref(self)
        # A forked process, such as a loader's worker, would keep the connections open.
        os.register_at_fork(after_in_child=lambda: _let_go(itself()))

    def watch(self, find: Callable[[], tuple[str, int] | None], lost: Callable[[], None]) -> None:
        """Watch the rank whose address ``find`` finds, asked again until it does.

        Returns when that rank, or this one, has said farewell; calls ``lost`` if it dies.

        Raises:
            OSError: it can't be connected to; or ``find`` raised it. That is no proof of a death: a
                firewall refuses, too.
        """
        pause = 0.1
        while (address := find()) is None:
            if self._ending.wait(pause):
                return
            pause = min(2 * pause, 5.0)  # it may have no optimizer, and never listen
        try:
            self._watched = socket.create_connection(address, _CONNECT_WITHIN_S)
        except ConnectionRefusedError:
            if find() is None:  # it has ended since
                return
            raise
        self._watched.settimeout(None)
        self._watched.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in _KEEPALIVE.items():
            if hasattr(socket, option):
                self._watched.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
        # Nobody accepts: the system connects, and closes with the process.
        try:
            farewell = self._watched.recv(1)
        except OSError:
            farewell = b""
        finally:
            self._watched.close()
        if not farewell and not self._ending.is_set():
            lost()

    def end(self) -> None:
        """Say farewell, and end `watch`."""
        self._ending.set()
        try:
            self._listener.setblocking(False)
            while True:  # others than the watcher may have come, such as a port scanner
                watcher, _ = self._listener.accept()
                with contextlib.suppress(OSError), watcher:  # it may be gone
                    watcher.sendall(_FAREWELL)
        except OSError:
            pass  # there are no more
        self._listener.close()
        if self._watched is not None:
            try:
                self._watched.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already


def own_address(host: str, port: int) -> str:
    """By which other hosts reach this one, if they reach it as ``host`` and ``port`` are reached.

    Raises:
        OSError: these are not reached.
    """
    with socket.create_connection((host, port), _CONNECT_WITHIN_S) as connection:
        address: str = connection.getsockname()[0]
        return address


def own_machine() -> str:
    """Where this process's loopback addresses lead to: differs between hosts, and containers."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    if not (boot.exists() and space.exists()):
        return socket.gethostname()
    # A host's first namespace has the same number on every host.
    return f"{boot.read_text().strip()}/{os.readlink(space)}"


def _let_go(lifeline: Lifeline | None) -> None:
    if lifeline is not None:
        lifeline._listener.close()
        if lifeline._watched is not None:
            lifeline._watched.close()
