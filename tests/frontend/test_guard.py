"""What a client sees of our bugs: that there was one. The log has its type and place, never its text."""

import asyncio
import logging
from typing import cast

import grpc
import pytest

from baton.inference.v1 import inference_pb2 as pb
from baton.inference.v1 import inference_pb2_grpc as rpc
from scheduler_svc.frontend import server
from scheduler_svc.frontend.generate import Inference
from scheduler_svc.frontend.health import Health
from scheduler_svc.port import PortInUseError
from tests.support.calls import failure_of


class Buggy:
    """Methods with a bug that knows the prompt."""

    async def generate(self, request):
        if request.HasField("token_ids"):
            yield pb.GenerateResponse(delta=pb.Delta(token_ids=[1]))
        raise KeyError(f"oh no: {request.text}")

    async def tokenize(self, request):
        raise ValueError(request.text)

    async def get_model(self, request):
        raise AssertionError(f"{request} sec" + "ret")


async def serve_and(call):
    """The error of `call(stub)` at a server with bugs."""
    running = server.build(cast(Inference, Buggy()), Health([]))
    address = server.bind(running, "127.0.0.1:0")
    await running.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await call(rpc.InferenceServiceStub(channel))
        return caught.value
    finally:
        await running.stop(None)


async def drain(call):
    return [event async for event in call]


@pytest.mark.parametrize(
    "call",
    [
        lambda stub: drain(stub.Generate(pb.GenerateRequest(text="secret"))),
        lambda stub: drain(stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])))),
        lambda stub: stub.Tokenize(pb.TokenizeRequest(text="secret")),
        lambda stub: stub.GetModel(pb.GetModelRequest()),
    ],
)
def test_bugs_stay_hidden(call, caplog):
    with caplog.at_level(logging.ERROR):
        failure = failure_of(asyncio.run(serve_and(call)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert failure.message == "internal error; the server's log has the details"
    (record,) = [r for r in caplog.records if "bug in" in r.getMessage()]
    assert "test_guard.py" in record.getMessage()
    assert any(kind in record.getMessage() for kind in ("KeyError", "ValueError", "AssertionError"))
    assert "secret" not in record.getMessage()


def test_a_port_that_is_not_ours():
    async def bind():
        server.bind(grpc.aio.server(), "192.0.2.1:5")

    with pytest.raises(PortInUseError, match=r"192\.0\.2\.1:5"):
        asyncio.run(bind())
