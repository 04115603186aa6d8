"""Many generations of one process at once, on an event loop in a thread, for callers that do not use asyncio.

Knows nothing about who asked or in which order answers are wanted: requests and progress carry a number.
"""

import asyncio
import queue
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any

from baton_client.aio import AsyncClient
from baton_client.errors import BatonError, ExhaustedError, UnavailableError
from baton_client.mux import AsyncMux
from baton_client.prompt import Messages
from baton_client.results import Delta, Event, Finish
from baton_client.sampling import Sampling

_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """What happened to request `number`: `prefilled` prompt tokens are done (once), tokens came, or it ended.

    `error` is set if it ended badly.
    """

    number: int
    prefilled: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish: Finish | None = None
    error: BaseException | None = None


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop that all pumps of this process share: grpc.aio is best with a single one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="baton-pump", daemon=True).start()
    return loop


class RequestPump:
    """Runs requests over one stream to a server, at most `max_in_flight` at a time, the rest in order.

    A full queue on the server is waited out; any other failure is reported with the request. Used by one
    thread.
    """

    def __init__(self, address: str, max_in_flight: int) -> None:
        self._progress: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        self._max_in_flight = max_in_flight
        self._tasks: set[asyncio.Task[None]] = set()
        self._run(self._open(address))

    def submit(self, number: int, prompt: str | list[int] | Messages, sampling: Sampling) -> None:
        """Start a request, or queue it behind those in flight."""
        _loop().call_soon_threadsafe(self._start, number, prompt, sampling)

    def wait(self) -> Progress:
        """Return the next progress of any request."""
        return self._progress.get()

    def poll(self) -> Progress | None:
        """Return the next progress if there is one already."""
        try:
            return self._progress.get_nowait()
        except queue.Empty:
            return None

    def cancel(self) -> None:
        """Cancel every request; when this returns, none of them will report anything more."""
        self._run(self._cancel())
        while self.poll():
            pass

    def close(self) -> None:
        """Cancel every request and close the connection."""
        self.cancel()
        self._run(self._client.close())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` on the loop and wait for it."""
        asyncio.run_coroutine_threadsafe(work, _loop()).result()

    async def _open(self, address: str) -> None:
        self._client = AsyncClient(address)
        self._places = asyncio.Semaphore(self._max_in_flight)
        self._mux: AsyncMux | None = None
        self._attempts: dict[int, _Attempt] = {}
        self._next = 0

    def _start(self, number: int, prompt: str | list[int] | Messages, sampling: Sampling) -> None:
        self._keep(self._serve(number, prompt, sampling))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = _loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, number: int, prompt: str | list[int] | Messages, sampling: Sampling) -> None:
        """Run one request to its end and report it."""
        try:
            async with self._places:
                token_ids = (
                    (await self._client.tokenize(prompt)).token_ids if isinstance(prompt, str) else prompt
                )
                while (error := await self._attempt(number, token_ids, sampling)) is not None:
                    await asyncio.sleep(error.retry_after_s or _RETRY_S)
        except Exception as error:  # whatever it is belongs to the caller, who waits for it
            self._progress.put(Progress(number, error=error))

    async def _attempt(self, number: int, prompt: Any, sampling: Sampling) -> ExhaustedError | None:
        """Run one request once, under an id of its own; what the server said if it had no room for it."""
        mux = self._stream()
        attempt = _Attempt(number, len(prompt), _loop().create_future())
        key, self._next = self._next, self._next + 1
        mux.start(key, prompt, sampling)
        self._attempts[key] = attempt
        try:
            return await attempt.end
        except asyncio.CancelledError:
            mux.cancel(key)
            raise
        finally:
            self._attempts.pop(key, None)

    def _stream(self) -> AsyncMux:
        """The stream that all requests share: opened for the first, and again after it was lost."""
        if self._mux is None:
            self._mux = self._client.mux()
            self._keep(self._read(self._mux))
        return self._mux

    async def _read(self, mux: AsyncMux) -> None:
        """Hand out what comes until the stream is lost, and every request on it."""
        lost: BaseException = UnavailableError("the server ended the stream")
        try:
            async with mux:
                async for batch in mux:
                    for key, event in batch:
                        attempt = self._attempts.get(key)
                        if attempt is not None:
                            self._take(attempt, event)
        except Exception as error:  # whatever it is belongs to those who wait for the requests
            lost = error
        finally:
            self._mux = None
            for attempt in self._attempts.values():
                if not attempt.end.done():
                    attempt.end.set_exception(lost)

    def _take(self, attempt: "_Attempt", event: Event | BatonError) -> None:
        """Report one event, or let its task deal with a failure."""
        if attempt.end.done():
            return
        number, prefilled = attempt.number, 0 if attempt.started else attempt.prompt_tokens
        if isinstance(event, Delta):
            token_ids = event.token_ids
            if prefilled and len(token_ids) > 1:  # the first came with its prefill, the others after it
                self._progress.put(Progress(number, prefilled, token_ids[:1]))
                prefilled, token_ids = 0, token_ids[1:]
            self._progress.put(Progress(number, prefilled, token_ids, event.text))
        elif isinstance(event, Finish):
            self._progress.put(Progress(number, prefilled, finish=event))
            attempt.end.set_result(None)
        elif isinstance(event, ExhaustedError) and not attempt.started and event.reason != "SLOW_READER":
            attempt.end.set_result(event)
        else:
            attempt.end.set_exception(event)
        attempt.started = True


@dataclass(slots=True)
class _Attempt:
    """A request on the stream. `end`: None where it was served, what was said where there was no room."""

    number: int
    prompt_tokens: int
    end: "asyncio.Future[ExhaustedError | None]"
    started: bool = False
