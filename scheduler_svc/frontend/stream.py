"""What the core said about one request and its writer has not yet taken.

A writer takes all that has gathered since its last write. `Stream` has a writer of its own: the first token
and the end wake it at once; in between the core link does, so that it can pace the writers. A
`GatheredStream` shares a writer with others, which it tells as soon as it has something. Knows nothing of
text or gRPC.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from baton_wire.frontend import Verdict
from scheduler_svc.frontend.errors import RequestError


class News(NamedTuple):
    """Tokens in order, and how the request ended, if it has: `over` after these tokens."""

    tokens: list[int]
    over: Verdict | RequestError | None


class Inbox:
    """What both kinds share: filled by the core link, emptied by one writer, all on the event loop's thread.

    `cached_tokens`: of the prompt, from the prefix cache; known before the first token.
    """

    __slots__ = ("_over", "_tokens", "cached_tokens", "handle")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.cached_tokens = 0
        self._tokens: list[int] = []
        self._over: Verdict | RequestError | None = None

    @property
    def is_over(self) -> bool:
        """Whether the core is done with the request."""
        return self._over is not None

    def put(self, token: int) -> None:
        """One more token."""
        raise NotImplementedError

    def end(self, over: Verdict | RequestError) -> None:
        """No more tokens follow; the first end counts."""
        raise NotImplementedError

    def collect(self) -> News:
        """All that has gathered, be it nothing."""
        tokens, self._tokens = self._tokens, []
        return News(tokens, self._over)


class Stream(Inbox):
    """Of a request with a writer of its own; after `put`, `wake` follows soon."""

    __slots__ = ("_awake", "_taken", "_waiter")

    def __init__(self, handle: int) -> None:
        super().__init__(handle)
        self._taken = False  # whether the writer has taken any
        self._awake = False  # whether it may take some now
        self._waiter: asyncio.Future[None] | None = None

    def put(self, token: int) -> None:
        """One more token; the first wakes the writer."""
        self._tokens.append(token)
        if not self._taken:
            self.wake()

    def end(self, over: Verdict | RequestError) -> None:
        """No more tokens follow; the first end counts, and wakes the writer."""
        if self._over is None:
            self._over = over
            self.wake()

    def wake(self) -> None:
        """Lets the writer take what there is."""
        if not self._tokens and self._over is None:
            return
        self._awake = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> News:
        """All that has gathered, once there is something and the writer is woken."""
        while not self._awake:
            assert self._waiter is None, "a stream has one writer"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._taken = True
        self._awake = self._over is not None
        return self.collect()


class GatheredStream(Inbox):
    """Of a request that shares its writer: calls `tell` whenever it had nothing and has something."""

    __slots__ = ("_tell",)

    def __init__(self, handle: int, tell: Callable[[], None]) -> None:
        super().__init__(handle)
        self._tell = tell

    def put(self, token: int) -> None:
        """One more token."""
        if not self._tokens and self._over is None:
            self._tell()
        self._tokens.append(token)

    def end(self, over: Verdict | RequestError) -> None:
        """No more tokens follow; the first end counts."""
        if self._over is None:
            self._over = over
            if not self._tokens:
                self._tell()
