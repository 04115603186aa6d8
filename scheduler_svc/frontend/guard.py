"""Between gRPC and our methods: bytes are parsed, errors become statuses, and nothing of ours leaks out.

gRPC itself would answer malformed bytes and exceptions by UNKNOWN, with the exception's text.
"""

import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from scheduler_svc.frontend.errors import Reason, RequestError, internal

Context = grpc.aio.ServicerContext[bytes, bytes]
Request = TypeVar("Request", bound=Message)
logger = logging.getLogger(__name__)


def unary(kind: type[Request], method: Callable[[Request], Awaitable[Message]]) -> Any:
    """The handler of a method that answers once."""

    async def handle(data: bytes, context: Context) -> bytes:
        async with _statuses(context, kind):
            return (await method(parse(kind, data))).SerializeToString()

    return grpc.unary_unary_rpc_method_handler(handle)


def streaming(kind: type[Request], method: Callable[[Request], AsyncIterator[Message]]) -> Any:
    """The handler of a method that answers by a stream. This is the one writer of that stream."""

    async def handle(data: bytes, context: Context) -> None:
        async with _statuses(context, kind), aclosing(method(parse(kind, data))) as events:  # type: ignore[type-var]
            async for event in events:
                await _write(context, event)

    return grpc.unary_stream_rpc_method_handler(handle)


def bidirectional(
    kind: type[Message], method: Callable[[AsyncIterator[bytes]], AsyncIterator[Message]]
) -> Any:
    """The handler of a method that reads a stream and answers by one. It parses itself what it reads, by
    `parse`: one bad message need not be the end of all. This is the one writer of the answer."""

    async def handle(requests: AsyncIterator[bytes], context: Context) -> None:
        async with _statuses(context, kind), aclosing(method(requests)) as events:  # type: ignore[type-var]
            async for event in events:
                await _write(context, event)

    return grpc.stream_stream_rpc_method_handler(handle)


class _ClientLeft(Exception):  # noqa: N818 - nothing is wrong with that
    """The client cancelled while it was written to, or its connection broke."""


async def _write(context: Context, event: Message) -> None:
    try:
        await context.write(event.SerializeToString())
    except grpc.aio.InternalError:
        raise _ClientLeft from None


def parse(kind: type[Request], data: bytes) -> Request:
    """The message in `data`. Raises `RequestError`."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise RequestError(
            Reason.MALFORMED_REQUEST, f"the bytes sent are no {kind.DESCRIPTOR.full_name}"
        ) from None


@asynccontextmanager
async def _statuses(context: Context, kind: type[Message]) -> AsyncIterator[None]:
    """Ends the call with the status of whatever is raised inside. Of a call that is over nothing is said."""
    try:
        yield
    except _ClientLeft:
        return
    except Exception as error:
        shown = showable(error, kind)
        await context.abort(shown.code, shown.message, shown.trailers())


def showable(error: Exception, kind: type[Message]) -> RequestError:
    """The error that a client may see of one that ended a request of that kind; the rest is for the log."""
    if isinstance(error, RequestError):
        if error.reason is Reason.NUMERICAL:
            logger.error("a request's logits were not finite")
        return error
    # The exception's text may hold a prompt: type and place only.
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("bug in %s: %s\n%s", kind.DESCRIPTOR.name, type(error).__name__, place)
    return internal()
