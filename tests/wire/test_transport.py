"""ZeroMQ sockets: what they refuse, how fast they see a peer die, and a link over them in real processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from baton_wire import transport
from baton_wire.link import Listener
from baton_wire.transport import (
    CurveKeys,
    DealerSocket,
    EndpointError,
    RouterSocket,
    default_run_dir,
    ipc_endpoint,
    private_ipc_dir,
    wait,
)


@pytest.fixture
def run_dir():
    path = private_ipc_dir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def endpoint(run_dir):
    return ipc_endpoint(run_dir / "test.ipc")


def until(condition, timeout_s=5.0):
    """Waits for `condition`; returns its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)
    return value


# ---- endpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RouterSocket, DealerSocket])
@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("tcp://127.0.0.1:5555", "plain tcp"),
        ("ipc:///tmp/" + "x" * 120, "at most 107"),
        ("ipc://relative", "absolute"),
        ("ipc://@abstract", "absolute"),
        ("inproc://x", "neither"),
        ("/tmp/x", "neither"),
    ],
)
def test_unsafe_endpoints_are_refused(kind, endpoint, words):
    with pytest.raises(EndpointError, match=words):
        kind(endpoint)


def test_the_longest_path_works(run_dir):
    path = run_dir / ("x" * (107 - len(os.fsencode(run_dir)) - 1))
    assert len(os.fsencode(path)) == 107
    router = RouterSocket(ipc_endpoint(path))
    dealer = DealerSocket(ipc_endpoint(path))
    until(lambda: dealer.send(b"x"))
    until(router.receive_all)
    dealer.close()
    router.close()
    with pytest.raises(EndpointError, match="108 bytes"):
        ipc_endpoint(Path(f"{path}x"))


def test_private_directories_are_private(tmp_path):
    short = private_ipc_dir()
    assert short.stat().st_mode & 0o777 == 0o700
    assert private_ipc_dir(short) == short
    short.chmod(0o750)
    with pytest.raises(EndpointError, match="open to other users"):
        private_ipc_dir(short)
    link = Path(f"{short}-link")
    link.symlink_to(short)
    with pytest.raises(EndpointError, match="not a directory of this user"):
        private_ipc_dir(link)
    link.unlink()
    short.rmdir()
    with pytest.raises(EndpointError, match="at most 107"):
        private_ipc_dir(tmp_path / ("x" * 100))


def test_default_run_dir(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_run_dir() == Path("/run/user/7/baton")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_run_dir() == Path(f"/tmp/baton-{os.getuid()}")


def test_an_endpoint_that_cannot_be_bound(run_dir):
    with pytest.raises(OSError, match="cannot listen"):
        RouterSocket(ipc_endpoint(run_dir / "missing" / "x.ipc"))


# ---- messages ---------------------------------------------------------------------------------------------


def test_messages_both_ways_and_strangers(endpoint):
    router = RouterSocket(endpoint)
    dealer = DealerSocket(endpoint)
    until(lambda: dealer.send(b"hello"))
    assert wait([router], 5)
    ((peer, data),) = until(router.receive_all)
    assert data == b"hello" and not router.readable()
    assert router.send(peer, b"welcome")
    assert wait([dealer], 5) and dealer.readable()
    assert dealer.receive_all() == [b"welcome"]
    assert not router.send(b"stranger", b"x") and router.dropped == 1
    assert not wait([router, dealer], 0.01)
    dealer.close()
    router.close()


def test_messages_of_other_shapes_are_dropped(endpoint):
    router = RouterSocket(endpoint)
    raw: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    raw.linger = 0
    raw.connect(endpoint)
    raw.send_multipart([b"a", b"b"])
    raw.send(b"good")
    assert [data for _, data in until(router.receive_all)] == [b"good"]
    assert router.malformed == 1
    raw.close()
    router.close()


def test_a_full_queue_drops_and_counts(endpoint, monkeypatch):
    monkeypatch.setattr(transport, "HIGH_WATER_FRAMES", 4)
    router = RouterSocket(endpoint)
    dealer = DealerSocket(endpoint)
    until(lambda: dealer.send(b"x"))
    ((peer, _),) = until(router.receive_all)
    assert all(router.send(peer, bytes(100_000)) for _ in range(100))  # dropped, but not gone
    assert router.dropped > 0
    dealer.close()
    router.close()


def test_nothing_is_queued_for_nobody(endpoint):
    dealer = DealerSocket(endpoint)
    assert not dealer.send(b"x") and dealer.dropped == 1
    router = RouterSocket(endpoint)
    until(lambda: dealer.send(b"first"))
    assert [data for _, data in until(router.receive_all)] == [b"first"]
    dealer.close()
    router.close()


def test_tcp_with_curve_and_no_other_way_in():
    (server, server_secret), (client, client_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    router = RouterSocket("tcp://127.0.0.1:0", curve=CurveKeys(server, server_secret))
    assert not router.endpoint.endswith(":0")
    dealer = DealerSocket(router.endpoint, curve=CurveKeys(client, client_secret, server))
    with socket.create_connection(("127.0.0.1", int(router.endpoint.rsplit(":", 1)[1]))) as raw:
        raw.sendall(os.urandom(1000))
        plain: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        plain.linger = 0
        plain.connect(router.endpoint)
        plain.send(b"plain")
        until(lambda: dealer.send(b"secret"))
        assert [data for _, data in until(router.receive_all)] == [b"secret"]
        time.sleep(0.2)
        assert router.receive_all() == []
        plain.close()
    dealer.close()
    with pytest.raises(EndpointError, match="public key"):
        DealerSocket(router.endpoint, curve=CurveKeys(client, client_secret))
    router.close()


# ---- peers that die ---------------------------------------------------------------------------------------

PROTO = Path(transport.__file__).parent.parent
BEATER = """
import sys, time
from baton_wire.link import Dialer
from baton_wire.transport import DealerSocket, wait
dealer, dialer = DealerSocket(sys.argv[1]), Dialer(b"hello", lambda: 7)
while True:
    for data in dealer.receive_all():
        for reply in dialer.receive(data, time.monotonic()).replies:
            dealer.send(reply)
    for data in dialer.tick(time.monotonic()):
        dealer.send(data)
    wait([dealer], 0.02)
"""


@pytest.fixture
def beater(endpoint):
    """A router, a listener with one session, and the process at its other end."""
    router, listener = RouterSocket(endpoint), Listener(1)
    process = subprocess.Popen([sys.executable, "-c", BEATER, endpoint], env={"PYTHONPATH": str(PROTO)})

    def session():
        for peer, data in router.receive_all():
            if listener.receive(peer, data, time.monotonic()).hello is not None:
                for answer in listener.accept(peer, time.monotonic()):
                    router.send(peer, answer)
        return listener.peers()

    until(session, 20)
    yield router, listener, process
    process.kill()
    process.wait()
    router.close()


def test_a_killed_peer_is_noticed_at_once(beater):
    router, listener, process = beater
    (peer,) = listener.peers()
    assert not router.disconnected()
    process.kill()
    start = time.monotonic()
    while not router.disconnected():
        wait([router], 1.0)
        router.receive_all()
        assert time.monotonic() < start + 5
    until(lambda: not router.send(peer, listener.link(peer).beat(0)), 1.0)
    assert time.monotonic() - start < 0.5


def test_a_stopped_peer_falls_silent(beater):
    router, listener, process = beater

    def silent(after_s):
        for peer, data in router.receive_all():
            listener.receive(peer, data, time.monotonic())
        return listener.silent(time.monotonic(), after_s)

    process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    until(lambda: silent(0.5))
    assert 0.3 < time.monotonic() - start < 2
    assert not router.disconnected()
    process.send_signal(signal.SIGCONT)
    until(lambda: not silent(0.5))


def test_a_router_that_comes_back_finds_its_dealers(endpoint):
    router = RouterSocket(endpoint)
    dealer = DealerSocket(endpoint)
    until(lambda: dealer.send(b"before"))
    ((before, _),) = until(router.receive_all)
    router.close()
    router = RouterSocket(endpoint)
    until(lambda: dealer.send(b"after") and wait([router], 0.1))
    assert router.receive_all()[0][0] == before
    dealer.close()
    router.close()
