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
from baton_client.errors import ExhaustedError
from baton_client.prompt import Messages
from baton_client.results import Delta, Finish
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
    """Runs requests against one server, at most `max_in_flight` at a time, the rest in order of arrival.

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

    def _start(self, number: int, prompt: str | list[int] | Messages, sampling: Sampling) -> None:
        task = _loop().create_task(self._serve(number, prompt, sampling))
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
                while not await self._attempt(number, token_ids, sampling):
                    pass
        except Exception as error:  # whatever it is belongs to the caller, who waits for it
            self._progress.put(Progress(number, error=error))

    async def _attempt(self, number: int, prompt: Any, sampling: Sampling) -> bool:
        """Run one request once; False if the server was too full to take it."""
        started = False
        try:
            async with self._client.generate(prompt, sampling) as stream:
                async for event in stream:
                    prefilled = 0 if started else len(prompt)
                    started = True
                    if isinstance(event, Delta):
                        self._progress.put(Progress(number, prefilled, event.token_ids, event.text))
                    else:
                        self._progress.put(Progress(number, prefilled, finish=event))
        except ExhaustedError as error:
            if started or error.reason == "SLOW_READER":
                raise
            await asyncio.sleep(error.retry_after_s or _RETRY_S)
            return False
        return True
