"""grpc.health.v1 tells the truth: serving exactly while a worker group is ready."""

import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.support.processes import wait_until
from tests.support.stack import SERVICE, start_stack

REQUEST, RESPONSE = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
SERVING, NOT_SERVING, UNKNOWN = RESPONSE.SERVING, RESPONSE.NOT_SERVING, RESPONSE.SERVICE_UNKNOWN


@pytest.fixture(scope="module")
def alone():
    with start_stack(workers=0) as running:
        yield running


class Watch:
    """A Watch call, read by a thread of its own."""

    def __init__(self, channel, service):
        self.seen = []
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch", REQUEST.SerializeToString, RESPONSE.FromString
        )
        self.call = watch(REQUEST(service=service))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            for reply in self.call:
                self.seen.append(reply.status)
        except grpc.RpcError:
            self.seen.append("over")


def test_serving_exactly_while_a_group_is_ready(alone):
    with alone.channel() as channel:
        watches = [Watch(channel, name) for name in ("", SERVICE)]
        lost = Watch(channel, "no.such.Service")
        wait_until(lambda: all(watch.seen == [NOT_SERVING] for watch in watches), why="the first status")
        assert not alone.serving()
        worker = alone.start_worker("one")
        alone.wait_ready(1)
        wait_until(lambda: all(watch.seen == [NOT_SERVING, SERVING] for watch in watches), why="serving")
        assert alone.serving()
        assert alone.serving("")
        worker.kill()
        wait_until(
            lambda: all(watch.seen == [NOT_SERVING, SERVING, NOT_SERVING] for watch in watches),
            timeout_s=1.0,
            why="not serving within a second of the worker's death",
        )
        assert not alone.serving()
        del alone.workers["one"]
        assert lost.seen == [UNKNOWN]
        for watch in (*watches, lost):
            watch.call.cancel()


def test_check_of_an_unknown_service(alone):
    with pytest.raises(grpc.RpcError) as caught:
        alone.serving("nope")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_malformed_bytes(alone):
    with alone.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"\x0a\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
