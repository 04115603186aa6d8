"""The blocking client.

    with Client("127.0.0.1:50051") as client:
        for event in client.generate("Once upon a time", Sampling(max_tokens=40)):
            ...

Knows nothing about how a server is started (`stack.py`) or what to do with many requests at once (`llm.py`).
"""

import time
from types import TracebackType
from typing import Any, Self

import grpc

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
from baton_client.errors import BatonError, DeadlineError, InternalError, UnavailableError, error_of_call
from baton_client.mux import Mux
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


class Stream:
    """The events of one generation, as they come: any number of Delta, then one Finish.

    Closing it, leaving its `with`, or dropping the last reference cancels the call, and the server ends the
    work within a step. Iterating raises a BatonError if the call fails.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._finished = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while True:
            try:
                event = event_of(next(self._call))
            except StopIteration:
                if self._finished:
                    raise
                raise InternalError("the stream ended without a finish") from None
            except grpc.RpcError as error:
                self._finished = True
                raise error_of_call(error) from None
            if event is not None:
                self._finished = self._finished or isinstance(event, Finish)
                return event

    def close(self) -> None:
        """Cancel the call; nothing happens if it has ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """A connection to one server, safe to use from several threads.

    `timeout_s` bounds every call that does not name its own; None lets a generation take as long as it needs.
    Nothing is sent before the first call, and a call to an address where nobody listens fails within a few
    seconds.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None, retries: bool = True
    ) -> None:
        self.address = checked_address(address)
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=channel_options(retries=retries))
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._check = self._channel.unary_unary(
            HEALTH_CHECK, request_serializer=health_request, response_deserializer=health_status
        )

    def generate(
        self, prompt: Prompt, sampling: Sampling = _DEFAULTS, *, timeout_s: float | None = None
    ) -> Stream:
        """Start generating; return the stream of events. `prompt` is text, token ids or chat messages."""
        request = generate_request(prompt, sampling)
        return Stream(self._stub.Generate(request, timeout=self._timeout(timeout_s)))

    def mux(self, *, timeout_s: float | None = None) -> Mux:
        """Open a stream for many generations at once; `timeout_s` bounds the stream as a whole."""
        return Mux(lambda requests: self._stub.GenerateMux(requests, timeout=self._timeout(timeout_s)))

    def complete(
        self, prompt: Prompt, sampling: Sampling = _DEFAULTS, *, timeout_s: float | None = None
    ) -> Completion:
        """Generate to the end and return the whole answer."""
        texts: list[str] = []
        token_ids: list[int] = []
        with self.generate(prompt, sampling, timeout_s=timeout_s) as stream:
            for event in stream:
                if isinstance(event, Delta):
                    texts.append(event.text)
                    token_ids.extend(event.token_ids)
                else:
                    return Completion("".join(texts), tuple(token_ids), event)
        raise AssertionError("a stream ends with a finish or an error")

    def tokenize(self, prompt: str | Messages, *, timeout_s: float | None = None) -> Tokens:
        """Return the token ids that `generate` would use for the same prompt."""
        request = tokenize_request(prompt)
        try:
            return tokens_of(self._stub.Tokenize(request, timeout=self._timeout(timeout_s)))
        except grpc.RpcError as error:
            raise error_of_call(error) from None

    def model(self, *, timeout_s: float | None = None) -> Model:
        """Describe the served model."""
        try:
            return model_of(self._stub.GetModel(pb.GetModelRequest(), timeout=self._timeout(timeout_s)))
        except grpc.RpcError as error:
            raise error_of_call(error) from None

    def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> HealthStatus:
        """Ask whether requests are taken now. Raises UnavailableError if nobody answers at the address."""
        try:
            return self._check(SERVICE, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of_call(error) from None

    def wait_ready(self, timeout_s: float = 60.0, *, absent_s: float | None = None) -> None:
        """Return once requests are taken. Raises UnavailableError with the last state after `timeout_s`.

        absent_s: how long, within that time, nobody may listen at the address; None: all of it.
        """
        wait = Wait(self.address, timeout_s, absent_s, time.monotonic())
        while True:
            answer: HealthStatus | BatonError
            try:
                answer = self.health(timeout_s=wait.call_timeout_s(time.monotonic()))
            except (UnavailableError, DeadlineError) as error:
                answer = error
            if wait.is_over(answer, time.monotonic()):
                return
            time.sleep(READY_POLL_S)

    def close(self) -> None:
        """Close the connection; streams that are still open are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s
