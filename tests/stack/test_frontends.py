"""Several front-ends behind one port: all of them serve, nobody else gets in, and they end as one."""

import os
import signal
import socket

import grpc
import pytest

from baton.inference.v1 import inference_pb2_grpc as rpc
from scheduler_svc.port import PortInUseError, Reservation
from tests.support.calls import expected, failure_of, ids_request
from tests.support.demo import DEMO_MODEL
from tests.support.processes import is_running, wait_until
from tests.support.stack import Stack, start_stack

THREE = ("--frontends=3", "--drain-grace-s=20")
NAMES = ("frontend-1", "frontend-2", "frontend-3")


def failed_start(listen, *arguments):
    """(exit status, what was logged) of a stack that cannot start."""
    stack = Stack(DEMO_MODEL, arguments, listen)
    try:
        return stack.scheduler.wait(), stack.scheduler.err
    finally:
        stack.stop()


def established(pid, port):
    """Connections of clients that a process has at its port."""
    inodes = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    count = 0
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as rows:
            for row in list(rows)[1:]:
                fields = row.split()
                local, state, inode = fields[1], fields[3], f"socket:[{fields[9]}]"
                count += state == "01" and int(local.rpartition(":")[2], 16) == port and inode in inodes
    return count


def test_all_of_them_serve():
    """Forty connections over three: each gets some (but for 3 times in 10 million), all tokens are right."""
    with start_stack(worker_args=("--step-us=2000", "--max-num-seqs=40"), scheduler_args=THREE) as running:
        channels = [running.channel() for _ in range(40)]
        requests = [ids_request([n + 1] * 9, seed=n, max_tokens=150, ignore_eos=True) for n in range(40)]
        calls = [
            rpc.InferenceServiceStub(channel).Generate(request)
            for channel, request in zip(channels, requests, strict=True)
        ]
        events = [[next(call)] for call in calls]
        port = int(running.address.rpartition(":")[2])
        shares = [established(running.pid(name), port) for name in NAMES]
        assert (sum(shares), min(shares) > 0) == (40, True), shares
        running.scheduler.signal(signal.SIGTERM)  # all drain
        for call, seen, request in zip(calls, events, requests, strict=True):
            seen += call
            tokens = [token for event in seen for token in event.delta.token_ids]
            assert tokens == expected(list(request.token_ids.ids), request, stop_id=None).tokens
        assert running.scheduler.wait() == 0
        assert "Traceback" not in running.scheduler.err
        for channel in channels:
            channel.close()


@pytest.mark.parametrize("frontends", ["--frontends=1", "--frontends=2"])
def test_nobody_else_gets_in(frontends):
    with start_stack(workers=0, scheduler_args=THREE) as first:
        code, log = failed_start(first.address, frontends)
        assert (code, f"cannot listen on {first.address}" in log) == (70, True)
        assert "Traceback" not in log
        with first.channel() as channel, pytest.raises(grpc.RpcError) as caught:
            list(rpc.InferenceServiceStub(channel).Generate(ids_request([1])))
        assert failure_of(caught.value).reason == "NO_WORKER"


def test_a_port_that_somebody_shares_already():
    """As gRPC's own default does."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, log = failed_start(f"127.0.0.1:{taken.getsockname()[1]}", "--frontends=2")
    assert (code, "cannot listen on" in log) == (70, True)


def test_the_death_of_one_ends_the_service():
    with start_stack(workers=0, scheduler_args=THREE) as running:
        pids = [running.pid(name) for name in NAMES]
        os.kill(pids[1], signal.SIGKILL)
        assert running.scheduler.wait(10.0) == 70
        assert "the frontend-2 was killed by SIGKILL; the service ends with it" in running.scheduler.err
        wait_until(lambda: not any(map(is_running, pids)), why="their end")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_reservation_holds_its_port(host):
    try:
        held = Reservation(f"{host}:0")
    except PortInUseError:
        pytest.skip(f"no {host} on this machine")
    with pytest.raises(PortInUseError, match="in use"):
        Reservation(held.address)
    held.close()
    Reservation(held.address).close()
