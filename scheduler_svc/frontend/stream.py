"""What the core said about one request and its writer has not yet taken.

One writer per stream takes all that has gathered since its last write. The first token and the end wake it at
once; in between the core link does, so that it can pace the writers. Knows nothing of text or gRPC.
"""

import asyncio
from dataclasses import dataclass

from baton_wire.frontend import Verdict
from scheduler_svc.frontend.errors import RequestError


@dataclass(frozen=True, slots=True)
class News:
    """Tokens in order, and how the request ended, if it has: `over` after these tokens."""

    tokens: list[int]
    over: Verdict | RequestError | None


class Stream:
    """Filled by the core link, emptied by one writer, both on the event loop's thread.

    `cached_tokens`: of the prompt, from the prefix cache; known before the first token.
    """

    __slots__ = ("_awake", "_over", "_taken", "_tokens", "_waiter", "cached_tokens", "handle")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.cached_tokens = 0
        self._tokens: list[int] = []
        self._taken = False  # whether the writer has taken any
        self._awake = False  # whether it may take some now
        self._over: Verdict | RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the core is done with the request."""
        return self._over is not None

    def put(self, token: int) -> None:
        """One more token, for which `wake` follows soon."""
        self._tokens.append(token)
        if not self._taken:
            self.wake()

    def end(self, over: Verdict | RequestError) -> None:
        """No more tokens follow; the first end counts."""
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
        tokens, self._tokens = self._tokens, []
        return News(tokens, self._over)
