"""Calls to a stack and what came of them, checked as every stream must be."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from baton.inference.v1 import inference_pb2 as pb
from baton.inference.v1 import inference_pb2_grpc as rpc
from baton_sim.fake_model import Expected, FakeModel, expected_tokens
from tests.support.stack import VOCAB_SIZE

DEMO_EOS = (1277, 1279)


@dataclass
class Answer:
    """One stream, whole once it is `done`."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    deltas: int = 0
    finish: pb.Finish = field(default_factory=pb.Finish)
    done: bool = False

    def add(self, event: pb.GenerateResponse) -> None:
        """One more event; asserts what holds in every stream."""
        assert not self.done, "an event after the finish"
        if event.WhichOneof("event") == "finish":
            self.finish, self.done = event.finish, True
            assert event.finish.usage.completion_tokens == len(self.tokens)
            return
        assert event.delta.index == len(self.tokens), "a gap or a repetition"
        assert event.delta.token_ids or event.delta.text, "an empty delta"
        self.tokens += event.delta.token_ids
        self.text += event.delta.text
        self.deltas += 1


async def collect(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> Answer:
    """The whole stream of a call."""
    answer = Answer()
    async for event in call:
        answer.add(event)
    assert answer.done, "a stream without a finish"
    return answer


async def gather(address: str, requests: list[pb.GenerateRequest]) -> list[Answer]:
    """All at once, over one connection."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.InferenceServiceStub(channel)
        return await asyncio.gather(*(collect(stub.Generate(request)) for request in requests))


def generate(channel: grpc.Channel, request: pb.GenerateRequest, timeout_s: float = 30.0) -> Answer:
    """One stream, waited for."""
    answer = Answer()
    for event in rpc.InferenceServiceStub(channel).Generate(request, timeout=timeout_s):
        answer.add(event)
    assert answer.done, "a stream without a finish"
    return answer


def ids_request(ids: list[int], *, seed: int = 0, **stopping: Any) -> pb.GenerateRequest:
    """A request of token ids."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.Sampling(seed=seed),
        stopping=pb.Stopping(**stopping),
    )


def expected(prompt: list[int], request: pb.GenerateRequest, *, stop_id: int | None = 1279) -> Expected:
    """What the fake workers of the `stack` fixture generate for a request with a seed and max_tokens."""
    stopping = request.stopping
    eos = () if stopping.ignore_eos else DEMO_EOS
    return expected_tokens(
        prompt,
        {"seed": request.sampling.seed},
        stopping.max_tokens,
        min_tokens=stopping.min_tokens,
        stop_ids=tuple(dict.fromkeys((*stopping.stop_token_ids, *eos))),
        model=FakeModel(VOCAB_SIZE, stop_id=stop_id),
    )


@dataclass(frozen=True)
class Failure:
    """A failed call: its status, and the details that it must carry."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str = ""
    retry_ms: int | None = None
    metadata: tuple[tuple[str, str], ...] = ()


def failure_of(error: Any) -> Failure:
    """What a failed call says; fails where it carries no ErrorInfo of ours."""
    trailers = dict(error.trailing_metadata() or ())
    assert "grpc-status-details-bin" in trailers, f"no details: {error}"
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    seen = [detail.Unpack(kind) for detail in status.details for kind in (info, bad, retry)]
    assert sum(seen) == len(status.details)
    assert info.domain == "baton"
    return Failure(
        error.code(),
        error.details(),
        info.reason,
        bad.field_violations[0].field if bad.field_violations else "",
        retry.retry_delay.ToMilliseconds() if retry.HasField("retry_delay") else None,
        tuple(sorted(info.metadata.items())),
    )
