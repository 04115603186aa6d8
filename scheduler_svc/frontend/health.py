"""grpc.health.v1: SERVING exactly while requests can be taken. Knows not why they can or cannot.

The library's own servicer has no List.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from grpc_health.v1 import health_pb2

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_Status = health_pb2.HealthCheckResponse
Context = grpc.aio.ServicerContext[bytes, bytes]


class Health:
    """One status for all of `names`; "" stands for the server as a whole and is always among them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset({"", *names})
        self._serving = False
        self._changed = asyncio.Event()  # replaced at every change

    def set(self, *, serving: bool) -> None:
        """Tells watchers, if it is news."""
        if serving != self._serving:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server registers."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check),
                "List": grpc.unary_unary_rpc_method_handler(self._list),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            },
        )

    def _status(self) -> int:
        return int(_Status.SERVING if self._serving else _Status.NOT_SERVING)

    async def _check(self, data: bytes, context: Context) -> bytes:
        name = await _name(data, context)
        if name not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return _encode(self._status())

    async def _list(self, _: bytes, context: Context) -> bytes:
        entry = _encode(self._status())
        return b"".join(
            _field(1, _field(1, name.encode()) + _field(2, entry)) for name in sorted(self._names)
        )

    async def _watch(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        """The status now, then at every change; of an unknown name, that it is unknown, for ever."""
        known = await _name(data, context) in self._names
        while True:
            changed, status = self._changed, self._status()
            yield _encode(status if known else _Status.SERVICE_UNKNOWN)
            await changed.wait()
            while not known:
                await self._changed.wait()


async def _name(data: bytes, context: Context) -> str:
    try:
        return health_pb2.HealthCheckRequest.FromString(data).service
    except Exception:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the bytes sent are no HealthCheckRequest")
        raise


def _encode(status: int) -> bytes:
    return _Status(status=status).SerializeToString()


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field of less than 128 bytes.

    Older health_pb2 has no HealthListResponse; its map is a repeated entry {1: name, 2: HealthCheckResponse}.
    """
    assert len(content) < 128
    return bytes((number << 3 | 2, len(content))) + content
