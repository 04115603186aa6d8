"""Many requests over one stream of gRPC: read and answered here, each one done as Generate would do it.

One reader starts and stops requests. One writer sends all that has gathered since its last write, so that the
stream costs a message per step and not per token; the first token of a quiet stream leaves at once. Whatever
happens to a request is told under its id and stays with it. Knows nothing of sockets.
"""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue, UInt64Value

from baton.inference.v1 import inference_pb2 as pb
from scheduler_svc.frontend import guard
from scheduler_svc.frontend.errors import Reason, RequestError, invalid
from scheduler_svc.frontend.generate import Inference
from scheduler_svc.frontend.generation import Generation
from scheduler_svc.frontend.stream import GatheredStream

MAX_REQUESTS = 1024  # of one stream, not ended; an end counts once it is about to be written
_MAX_UNREAD = 2 * MAX_REQUESTS  # refusals included; beyond it nothing is read until some are written
_MESSAGE_TOKENS = 32_768  # a message ends with the event that brings it there: well below 4 MB, a usual limit


async def serve(
    inference: Inference, requests: AsyncIterator[bytes]
) -> AsyncIterator[pb.GenerateMuxResponse]:
    """Messages of one stream. Closing the iterator withdraws all its requests."""
    mux = _Mux(inference)
    reader = asyncio.create_task(mux.read(requests))
    try:
        while (response := await mux.gather()) is not None:
            yield response
        await reader
    finally:
        reader.cancel()
        mux.close()


class _Request:
    """One request, from its start until its end is written. `generation` once the core has it."""

    __slots__ = ("beginning", "error", "generation", "id")

    def __init__(self, number: int) -> None:
        self.id = number
        self.beginning: asyncio.Task[None] | None = None
        self.generation: Generation[GatheredStream] | None = None
        self.error: RequestError | None = None

    def stop(self) -> None:
        """Ends the work."""
        if self.beginning is not None:
            self.beginning.cancel()
        if self.generation is not None:
            self.generation.close()


class _Mux:
    """The requests of one stream by their id, and which of them have something to tell."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._requests: dict[int, _Request] = {}
        self._news: list[_Request] = []  # may name one twice, or one that is over: `_requests` knows
        self._told = asyncio.Event()
        self._room = asyncio.Event()
        self._reading = True

    # ---- in ---------------------------------------------------------------------------------------------

    async def read(self, requests: AsyncIterator[bytes]) -> None:
        """Does what the client asks, until it has sent its last. Raises where that is no message at all."""
        try:
            async for data in requests:
                self._act(data)
                while len(self._requests) >= _MAX_UNREAD:
                    self._room.clear()
                    await self._room.wait()
        except BaseException:
            self.close()
            raise
        finally:
            self._reading = False
            self._told.set()

    def _act(self, data: bytes) -> None:
        try:
            message = guard.parse(pb.GenerateMuxRequest, data)
        except RequestError as error:
            number = _started_id(data)
            if number is None:
                raise
            self._refuse(number, error)
            return
        match message.WhichOneof("action"):
            case "start":
                self._start(message.start.id, message.start.request)
            case "cancel" if message.cancel.id in self._requests:
                cancelled = RequestError(Reason.CANCELLED, "the client cancelled the request")
                self._fail(self._requests[message.cancel.id], cancelled)

    def _start(self, number: int, generate: pb.GenerateRequest) -> None:
        if number in self._requests:
            self._refuse(number, invalid("start.id", f"{number} is in use; both requests end"))
        elif len(self._requests) >= MAX_REQUESTS:
            message = f"{MAX_REQUESTS} requests on this stream have not ended; wait for one, or use another"
            self._refuse(number, RequestError(Reason.STREAM_FULL, message))
        else:
            request = self._requests[number] = _Request(number)
            request.beginning = asyncio.create_task(self._begin(request, generate))

    async def _begin(self, request: _Request, generate: pb.GenerateRequest) -> None:
        try:
            tell = partial(self._tell, request)
            request.generation = await self._inference.begin(generate, partial(GatheredStream, tell=tell))
        except Exception as error:
            self._fail(request, guard.showable(error, pb.GenerateRequest))

    def _refuse(self, number: int, error: RequestError) -> None:
        """A request that does not start; one under the same id ends with it."""
        self._fail(self._requests.setdefault(number, _Request(number)), error)

    def _fail(self, request: _Request, error: RequestError) -> None:
        request.error = error
        request.stop()
        self._tell(request)

    def _tell(self, request: _Request) -> None:
        self._news.append(request)
        self._told.set()

    # ---- out --------------------------------------------------------------------------------------------

    async def gather(self) -> pb.GenerateMuxResponse | None:
        """All that has happened since the last call, once something has; None at the end of the stream."""
        while True:
            while not self._news:
                if not self._reading and not self._requests:
                    return None
                self._told.clear()
                await self._told.wait()
            response = self._respond()
            self._room.set()
            if response.events:
                return response

    def _respond(self) -> pb.GenerateMuxResponse:
        news, self._news = self._news, []
        response = pb.GenerateMuxResponse()
        tokens = 0
        for place, request in enumerate(news):
            if tokens >= _MESSAGE_TOKENS:
                self._news = news[place:]
                break
            if self._requests.get(request.id) is request:
                tokens += self._report(request, response)
        return response

    def _report(self, request: _Request, response: pb.GenerateMuxResponse) -> int:
        """Adds the events of one request; the number of their tokens."""
        tokens = 0
        try:
            if request.error is not None:
                raise request.error
            generation = request.generation
            assert generation is not None, "only a request at work has news"
            piece = generation.advance(generation.stream.collect())
            if piece is not None:
                event = response.events.add()
                event.id = request.id
                piece.write(event.delta)
                tokens = len(piece.tokens)
            if generation.is_over:
                finish = generation.finish()
                self._end(request)
                response.events.add(id=request.id, finish=finish)
        except Exception as error:
            self._end(request)
            status = guard.showable(error, pb.GenerateRequest).status()
            failure = pb.MuxError(code=status.code, message=status.message, details=status.details)
            response.events.add(id=request.id, error=failure)
        return tokens

    def _end(self, request: _Request) -> None:
        request.stop()
        del self._requests[request.id]

    def close(self) -> None:
        """Ends the work of all."""
        for request in self._requests.values():
            request.stop()
        self._requests.clear()
        self._news.clear()


def _started_id(data: bytes) -> int | None:
    """The id in a start whose request is broken (a prompt that is no UTF-8, say); None where there is none.

    Read by messages of the same layout that leave the request alone: a start is field 1 of the message, its
    id field 1 of the start.
    """
    try:
        start = BytesValue.FromString(data).value
        return UInt64Value.FromString(start).value if start else None
    except DecodeError:
        return None
