"""ZeroMQ sockets under a link: they carry frames, may lose them, and notice quickly when a peer is gone.

The only module that imports zmq. Knows nothing of frames. ipc sockets live in private directories with short
paths; tcp is for CURVE only, since whoever can reach a plain port could speak.
"""

import math
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from baton_wire.frame import MAX_FRAME_BYTES

MAX_IPC_PATH_BYTES = 107  # sun_path holds 108 with its NUL
HIGH_WATER_FRAMES = 1024  # queued per peer; what does not fit is dropped, and sent again by the link
_RECONNECT_MS = (50, 500)
_LINGER_MS = 200  # how long a farewell may take


class EndpointError(ValueError):
    """An endpoint, or a directory for one, that is not safe or not possible; the text says why."""


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """Keys of CURVE, 40 characters of Z85 each. A dialer also needs the `server` public key.

    A listener lets in whoever knows its public key, so that key is to be kept among its workers.
    """

    public: bytes
    secret: bytes
    server: bytes | None = None


def default_run_dir() -> Path:
    """Where a scheduler and its workers meet unless told otherwise; not created."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "baton" if runtime else Path(f"/tmp/baton-{os.getuid()}")


def private_ipc_dir(path: Path | None = None) -> Path:
    """A directory that only this user can enter: `path`, made if need be, else a new temporary one.

    Raises `EndpointError` where it belongs to somebody else, others may enter it, or its name leaves no room
    for the name of a socket.
    """
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
    else:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EndpointError(f"{path} is not a directory of this user")
    if found.st_mode & 0o077:
        raise EndpointError(f"{path} is open to other users (mode {stat.S_IMODE(found.st_mode):o}, not 700)")
    ipc_endpoint(path / "frontends.ipc")
    return path


def ipc_endpoint(path: Path) -> str:
    """The endpoint of the socket file `path`; `EndpointError` where the path is too long for one."""
    endpoint = f"ipc://{path}"
    check_endpoint(endpoint)
    return endpoint


def check_endpoint(endpoint: str, curve: CurveKeys | None = None) -> None:
    """Raises `EndpointError` for what nobody could dial or bind, or should."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        size = len(os.fsencode(rest))
        if size > MAX_IPC_PATH_BYTES:
            raise EndpointError(f"path of {size} bytes, a socket's has at most {MAX_IPC_PATH_BYTES}: {rest}")
        if not rest.startswith("/"):
            raise EndpointError(f"ipc needs an absolute path: {endpoint}")
    elif scheme == "tcp":
        if curve is None:
            raise EndpointError(f"plain tcp is refused, use ipc, or tcp with CURVE keys: {endpoint}")
    else:
        raise EndpointError(f"neither ipc nor tcp: {endpoint}")


class _Socket:
    """What both ends share: options, non-blocking input, waiting, closing."""

    def __init__(self, kind: int, curve: CurveKeys | None) -> None:
        self.dropped = 0  # frames not sent: queue full, or nobody there
        self.malformed = 0  # messages of a wrong number of parts
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket: zmq.Socket[bytes] = self._context.socket(kind)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = HIGH_WATER_FRAMES
        self._socket.maxmsgsize = MAX_FRAME_BYTES
        if curve is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey = curve.public, curve.secret

    def fileno(self) -> int:
        """Descriptor for an event loop. It is edge-triggered and fires for output too: after it fires, and
        after every `send`, read with `receive_all` until `readable` is False."""
        return int(self._socket.fd)

    def readable(self) -> bool:
        """Whether a message waits."""
        return bool(int(self._socket.events) & zmq.POLLIN)

    def close(self, *, flush: bool = False) -> None:
        """Closes; with `flush`, frames sent before may take a moment to leave."""
        self._socket.close(_LINGER_MS if flush else 0)

    def _watched(self) -> list[zmq.Socket[bytes]]:
        return [self._socket]

    def _receive_parts(self, count: int) -> list[list[bytes]]:
        """All messages that wait and have `count` parts."""
        messages = []
        try:
            while True:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
                if len(parts) == count:
                    messages.append(parts)
                else:
                    self.malformed += 1
        except zmq.Again:
            return messages


class RouterSocket(_Socket):
    """The listener's socket: many peers, each with an identity."""

    def __init__(self, endpoint: str, *, curve: CurveKeys | None = None) -> None:
        """Binds. `EndpointError` for an unsafe or impossible endpoint, `OSError` where binding fails."""
        check_endpoint(endpoint, curve)
        super().__init__(zmq.ROUTER, curve)
        self._socket.router_mandatory = True
        self._socket.router_handover = True  # a peer that reconnects replaces what is left of it
        if curve is not None:
            self._socket.curve_server = True
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"cannot listen on {endpoint}: {error}") from None
        bound = self._socket.get_string(zmq.LAST_ENDPOINT)
        self.endpoint = bound.rstrip("\0")  # with the port that was picked, for tcp to port 0

    def send(self, peer: bytes, data: bytes) -> bool:
        """Sends, or drops where the peer's queue is full. False where the peer is gone."""
        try:
            self._socket.send_multipart((peer, data), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.dropped += 1
            return False
        return True

    def receive_all(self) -> list[tuple[bytes, bytes]]:
        """What waits: (peer, data) each."""
        return [(peer, data) for peer, data in self._receive_parts(2)]

    def disconnected(self) -> bool:
        """Whether some peer has gone since the last call. Which, `send` tells: it returns False for them."""
        gone = False
        try:
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
                gone = gone or event["event"] == zmq.EVENT_DISCONNECTED
        except zmq.Again:
            return gone

    def close(self, *, flush: bool = False) -> None:
        """Closes; with `flush`, frames sent before may take a moment to leave."""
        if not self._socket.closed:
            self._socket.disable_monitor()
        super().close(flush=flush)

    def _watched(self) -> list[zmq.Socket[bytes]]:
        return [self._socket, self._monitor]


class DealerSocket(_Socket):
    """The dialer's socket: one peer, dialled again for ever."""

    def __init__(self, endpoint: str, *, curve: CurveKeys | None = None) -> None:
        """Dials. `EndpointError` for an unsafe or impossible endpoint; nobody need be there."""
        check_endpoint(endpoint, curve)
        super().__init__(zmq.DEALER, curve)
        self._socket.routing_id = b"D" + os.urandom(15)  # may not begin with zero
        self._socket.immediate = True  # queue nothing for a peer that is not there
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = _RECONNECT_MS
        if curve is not None:
            if curve.server is None:
                raise EndpointError("a dialer needs the server's public key")
            self._socket.curve_serverkey = curve.server
        self._socket.connect(endpoint)

    def send(self, data: bytes) -> bool:
        """Sends; False where the frame was dropped, as nobody is there or the queue is full."""
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
            return False
        return True

    def receive_all(self) -> list[bytes]:
        """What waits."""
        return [parts[0] for parts in self._receive_parts(1)]


def wait(sockets: Sequence[RouterSocket | DealerSocket], timeout_s: float) -> bool:
    """Sleeps until a message waits on one of `sockets`, or one of their peers has gone; False on time-out."""
    poller = zmq.Poller()
    for socket in sockets:
        for watched in socket._watched():
            poller.register(watched, zmq.POLLIN)
    return bool(poller.poll(math.ceil(max(0.0, timeout_s) * 1000)))
