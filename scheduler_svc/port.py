"""The port that several front-ends share, held for one service.

Front-ends that share a port listen with SO_REUSEPORT, and the kernel spreads connections over them; it
would let any other process of this user join that asks the same way. `Reservation` therefore takes a lock
that every service with several front-ends takes, then binds the port without sharing, which fails where
anybody listens, and opens it for sharing only then. It never listens itself, so that no connection is its.
Knows nothing of gRPC.
"""

import os
import socket
import sys


class PortInUseError(Exception):
    """Nobody can listen where it was asked for."""

    def __init__(self, listen: str) -> None:
        port = listen.rpartition(":")[2]
        super().__init__(f"cannot listen on {listen}: port {port} is in use, or not this machine's")


class Reservation:
    """Holds host:port until it is closed; `address` has the port that was picked, where that was 0."""

    def __init__(self, listen: str) -> None:
        """Raises `PortInUseError`."""
        host, _, port = listen.rpartition(":")
        self._sockets: list[socket.socket] = []
        try:
            for address in _addresses(host.strip("[]"), int(port)):
                if self._sockets:  # of a name with several addresses all get one port
                    address = (address[0], self._sockets[0].getsockname()[1])
                held = _bind(*address)
                self._sockets.append(held)
                self._sockets.append(_lock(*held.getsockname()[:2]))
        except OSError:
            self.close()
            raise PortInUseError(listen) from None
        self.address = f"{host}:{self._sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Anybody may have the port, once nobody listens."""
        for held in self._sockets:
            held.close()
        self._sockets.clear()


def _addresses(host: str, port: int) -> list[tuple[str, int]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((str(entry[4][0]), port) for entry in found))


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections just closed do not count
        held.bind((host, port))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        held.close()
        raise
    return held


def _lock(host: str, port: int) -> socket.socket:
    """One holder for each address of this user, gone with its process. Two may bind while neither listens."""
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if sys.platform == "linux":  # elsewhere there are no names without files
        try:
            held.bind(f"\0baton-port-{os.getuid()}-{host}-{port}")
        except OSError:
            held.close()
            raise
    return held
