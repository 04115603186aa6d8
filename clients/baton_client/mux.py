"""Many generations over one stream, for callers that run hundreds at once: a message per step, not per token.

    with client.mux() as mux:
        for number, prompt in enumerate(prompts):
            mux.start(number, prompt, Sampling(max_tokens=40))
        mux.done()
        for batch in mux:
            for number, event in batch:
                ...

Numbers are the caller's; one may be used again after its end, which is a Finish or a BatonError. Requests are
told apart by their number only: what becomes of one is never raised. Knows nothing of connections.
"""

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import grpc
import grpc.aio

from baton.inference.v1 import inference_pb2 as pb
from baton_client.errors import BatonError, error_of, error_of_call, error_of_status
from baton_client.prompt import Prompt, fill_request
from baton_client.results import Event, Finish, delta_of, finish_of
from baton_client.sampling import Sampling

Batch = list[tuple[int, Event | BatonError]]
_DEFAULTS = Sampling()


class _Open:
    """Requests of a stream that have not ended, and whether more may come.

    The sending side is closed when neither is so: until then a cancel still has a way to go.
    """

    def __init__(self) -> None:
        self._numbers: Counter[int] = Counter()
        self._is_last = False
        self._lock = threading.Lock()

    def start(self, number: int) -> None:
        with self._lock:
            if self._is_last:
                raise BatonError(f"request {number} was started after done()")
            self._numbers[number] += 1

    def done(self) -> bool:
        """No more will come; whether that is the end, told once."""
        with self._lock:
            was_last, self._is_last = self._is_last, True
            return not was_last and not self._numbers

    def ended(self, batch: Batch) -> bool:
        """Takes note of the ends in a batch; whether the last of all is among them."""
        ends = [number for number, event in batch if isinstance(event, Finish | BatonError)]
        if not ends:
            return False
        with self._lock:
            for number in ends:
                self._numbers[number] -= 1
                if self._numbers[number] <= 0:
                    del self._numbers[number]
            return self._is_last and not self._numbers


class Mux:
    """A mux stream of the blocking client. Iterating gives batches of (number, event) as they come.

    It ends once `done` was called and all requests have ended, and raises a BatonError if the stream itself
    fails, which ends all requests. `start`, `cancel` and `done` may be called from any thread and never
    block. Closing it, or leaving its `with`, cancels what runs.
    """

    def __init__(self, open_call: Callable[[Iterator[pb.GenerateMuxRequest]], Any]) -> None:
        self._requests: queue.SimpleQueue[pb.GenerateMuxRequest | None] = queue.SimpleQueue()
        self._open = _Open()
        self._call = open_call(iter(self._requests.get, None))

    def start(self, number: int, prompt: Prompt, sampling: Sampling = _DEFAULTS) -> None:
        """Start a request under a number in [0, 2^64) that is not in use. BatonError after `done`."""
        message = _start(number, prompt, sampling)
        self._open.start(number)
        self._requests.put(message)

    def cancel(self, number: int) -> None:
        """Stop a request; it ends with a CallCancelledError, unless its end was on its way already."""
        self._requests.put(_cancel(number))

    def done(self) -> None:
        """No request will be started any more; what runs may still be cancelled."""
        if self._open.done():
            self._requests.put(None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            batch = _batch(next(self._call))
        except grpc.RpcError as error:
            raise error_of_call(error) from None
        if self._open.ended(batch):
            self._requests.put(None)
        return batch

    def close(self) -> None:
        """Cancel everything; nothing happens if the stream has ended."""
        self._call.cancel()
        self._requests.put(None)  # ends the thread that sends

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncMux:
    """A mux stream of the asyncio client: the twin of `Mux`, for one event loop."""

    def __init__(self, open_call: Callable[[AsyncIterator[pb.GenerateMuxRequest]], Any]) -> None:
        self._requests: asyncio.Queue[pb.GenerateMuxRequest | None] = asyncio.Queue()
        self._open = _Open()
        self._call = open_call(_drain(self._requests))
        self._messages = self._call.__aiter__()

    def start(self, number: int, prompt: Prompt, sampling: Sampling = _DEFAULTS) -> None:
        """Start a request under a number in [0, 2^64) that is not in use. BatonError after `done`."""
        message = _start(number, prompt, sampling)
        self._open.start(number)
        self._requests.put_nowait(message)

    def cancel(self, number: int) -> None:
        """Stop a request; it ends with a CallCancelledError, unless its end was on its way already."""
        self._requests.put_nowait(_cancel(number))

    def done(self) -> None:
        """No request will be started any more; what runs may still be cancelled."""
        if self._open.done():
            self._requests.put_nowait(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        try:
            batch = _batch(await self._messages.__anext__())
        except grpc.aio.AioRpcError as error:
            raise error_of(error.code(), error.details(), error.trailing_metadata()) from None
        if self._open.ended(batch):
            self._requests.put_nowait(None)
        return batch

    async def aclose(self) -> None:
        """Cancel everything; nothing happens if the stream has ended."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        """Return once the stream is open, so that no request waits for that; iterating tells if it failed."""
        try:
            await self._call.wait_for_connection()
        except grpc.aio.AioRpcError:
            pass
        except BaseException:
            self._call.cancel()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _drain(
    requests: asyncio.Queue[pb.GenerateMuxRequest | None],
) -> AsyncIterator[pb.GenerateMuxRequest]:
    while (request := await requests.get()) is not None:
        yield request


def _start(number: int, prompt: Prompt, sampling: Sampling) -> pb.GenerateMuxRequest:
    message = pb.GenerateMuxRequest()
    message.start.id = number
    fill_request(message.start.request, prompt, sampling)
    return message


def _cancel(number: int) -> pb.GenerateMuxRequest:
    return pb.GenerateMuxRequest(cancel=pb.MuxCancel(id=number))


def _batch(response: pb.GenerateMuxResponse) -> Batch:
    """Read one message; kinds of events that this version does not know are left out."""
    batch: Batch = []
    for event in response.events:
        match event.WhichOneof("event"):
            case "delta":
                batch.append((event.id, delta_of(event.delta)))
            case "finish":
                batch.append((event.id, finish_of(event.finish)))
            case "error":
                batch.append((event.id, error_of_status(event.error.SerializeToString())))
    return batch
