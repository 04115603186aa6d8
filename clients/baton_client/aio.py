"""The asyncio client: the twin of `client.py`, method for method.

async with AsyncClient("127.0.0.1:50051") as client:
    async for event in client.generate("Once upon a time", Sampling(max_tokens=40)):
        ...
"""

import asyncio
import time
from typing import Self

import grpc
import grpc.aio

from baton.inference.v1 import inference_pb2 as pb
from baton.inference.v1 import inference_pb2_grpc
from baton_client.channel import (
    DEFAULT_ADDRESS,
    HEALTH_CHECK,
    SERVICE,
    channel_options,
    checked_address,
    health_request,
    health_status,
)
from baton_client.errors import BatonError, DeadlineError, InternalError, UnavailableError, error_of
from baton_client.mux import AsyncMux
from baton_client.prompt import Messages, Prompt, generate_request, tokenize_request
from baton_client.readiness import HEALTH_TIMEOUT_S, READY_POLL_S, Wait
from baton_client.results import (
    Completion,
    Delta,
    Event,
    Finish,
    HealthStatus,
    Model,
    Tokens,
    event_of,
    model_of,
    tokens_of,
)
from baton_client.sampling import Sampling

_DEFAULTS = Sampling()


def _error_of(error: grpc.aio.AioRpcError) -> BatonError:
    return error_of(error.code(), error.details(), error.trailing_metadata())


class AsyncStream:
    """The events of one generation, as they come: any number of Delta, then one Finish.

    Closing it or leaving its `async with` cancels the call, and so does cancelling the task that iterates.
    """

    def __init__(self, call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]") -> None:
        self._call = call
        self._messages = call.__aiter__()
        self._finished = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while True:
            try:
                event = event_of(await self._messages.__anext__())
            except StopAsyncIteration:
                if self._finished:
                    raise
                raise InternalError("the stream ended without a finish") from None
            except grpc.aio.AioRpcError as error:
                self._finished = True
                raise _error_of(error) from None
            except asyncio.CancelledError:
                self._call.cancel()
                raise
            if event is not None:
                self._finished = self._finished or isinstance(event, Finish)
                return event

    async def aclose(self) -> None:
        """Cancel the call; nothing happens if it has ended."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncClient:
    """A connection to one server, for the event loop on which it is made.

    `timeout_s` bounds every call that does not name its own; None lets a generation take as long as it needs.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None, retries: bool = True
    ) -> None:
        self.address = checked_address(address)
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=channel_options(retries=retries))
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._check = self._channel.unary_unary(
            HEALTH_CHECK, request_serializer=health_request, response_deserializer=health_status
        )

    def generate(
        self, prompt: Prompt, sampling: Sampling = _DEFAULTS, *, timeout_s: float | None = None
    ) -> AsyncStream:
        """Start generating; return the stream of events. `prompt` is text, token ids or chat messages."""
        request = generate_request(prompt, sampling)
        return AsyncStream(self._stub.Generate(request, timeout=self._timeout(timeout_s)))

    def mux(self, *, timeout_s: float | None = None) -> AsyncMux:
        """Open a stream for many generations at once; `timeout_s` bounds the stream as a whole."""
        return AsyncMux(lambda requests: self._stub.GenerateMux(requests, timeout=self._timeout(timeout_s)))

    async def complete(
        self, prompt: Prompt, sampling: Sampling = _DEFAULTS, *, timeout_s: float | None = None
    ) -> Completion:
        """Generate to the end and return the whole answer."""
        texts: list[str] = []
        token_ids: list[int] = []
        async with self.generate(prompt, sampling, timeout_s=timeout_s) as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    texts.append(event.text)
                    token_ids.extend(event.token_ids)
                else:
                    return Completion("".join(texts), tuple(token_ids), event)
        raise AssertionError("a stream ends with a finish or an error")

    async def tokenize(self, prompt: str | Messages, *, timeout_s: float | None = None) -> Tokens:
        """Return the token ids that `generate` would use for the same prompt."""
        request = tokenize_request(prompt)
        try:
            return tokens_of(await self._stub.Tokenize(request, timeout=self._timeout(timeout_s)))
        except grpc.aio.AioRpcError as error:
            raise _error_of(error) from None

    async def model(self, *, timeout_s: float | None = None) -> Model:
        """Describe the served model."""
        try:
            return model_of(await self._stub.GetModel(pb.GetModelRequest(), timeout=self._timeout(timeout_s)))
        except grpc.aio.AioRpcError as error:
            raise _error_of(error) from None

    async def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> HealthStatus:
        """Ask whether requests are taken now. Raises UnavailableError if nobody answers at the address."""
        try:
            status: HealthStatus = await self._check(SERVICE, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _error_of(error) from None
        return status

    async def wait_ready(self, timeout_s: float = 60.0, *, absent_s: float | None = None) -> None:
        """Return once requests are taken. Raises UnavailableError with the last state after `timeout_s`.

        absent_s: how long, within that time, nobody may listen at the address; None: all of it.
        """
        wait = Wait(self.address, timeout_s, absent_s, time.monotonic())
        while True:
            answer: HealthStatus | BatonError
            try:
                answer = await self.health(timeout_s=wait.call_timeout_s(time.monotonic()))
            except (UnavailableError, DeadlineError) as error:
                answer = error
            if wait.is_over(answer, time.monotonic()):
                return
            await asyncio.sleep(READY_POLL_S)

    async def close(self) -> None:
        """Close the connection; streams that are still open are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s
