"""The front-end's end of a mux stream, with requests begun by a test in place of a core."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from baton.inference.v1 import inference_pb2 as pb
from baton_wire.frontend import Verdict
from scheduler_svc.frontend import mux
from scheduler_svc.frontend.detokenizer import Detokenization
from scheduler_svc.frontend.errors import Reason, RequestError
from scheduler_svc.frontend.generate import Inference
from scheduler_svc.frontend.generation import Generation
from scheduler_svc.frontend.output import Output
from tests.support.tokenizers_zoo import byte_level

_DETOKENIZATION = Detokenization(byte_level())


class Begun:
    """Begins what it is asked to; `streams` are for the test to fill, `closed` says which were."""

    def __init__(self):
        self.streams: list[Any] = []
        self.closed: set[int] = set()  # handles
        self.gate: asyncio.Event | None = None

    async def begin(self, request, kind):
        if self.gate is not None:
            await self.gate.wait()
        if request.text == "bug":
            raise KeyError(f"oh no: {request.token_ids}", "sec" + "ret")
        self.streams.append(kind(len(self.streams)))
        return Generation(self.streams[-1], Output(_DETOKENIZATION.new(), (), 3), self._close)

    def _close(self, stream):
        self.closed.add(stream.handle)


class Opened:
    """A mux stream under test."""

    def __init__(self):
        self.begun = Begun()
        self._sent: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._responses = cast(
            AsyncGenerator[pb.GenerateMuxResponse], mux.serve(cast(Inference, self.begun), self._requests())
        )
        self._next: asyncio.Future[pb.GenerateMuxResponse] | None = None

    async def _requests(self):
        while (data := await self._sent.get()) is not None:
            yield data

    def _read(self):
        """The next message, awaited from now on."""
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._responses))
        return self._next

    async def send(self, *messages):
        """Sends, and lets the server act. The writer writes one message, as if the client were slow."""
        self._read()
        for message in messages:
            self._sent.put_nowait(message)
        for _ in range(10 + 3 * len(messages)):
            await asyncio.sleep(0)

    async def events(self):
        """(id, kind, tokens or code) of the next message."""
        response = await asyncio.wait_for(self._read(), 5.0)
        self._next = None
        named = [(event.id, event.WhichOneof("event"), event) for event in response.events]
        values = {"delta": lambda e: list(e.delta.token_ids), "error": lambda e: e.error.code}
        return [(number, kind, values.get(kind, lambda _: None)(event)) for number, kind, event in named]

    async def close(self):
        """As when the client leaves."""
        if self._next is not None and not self._next.done():
            self._next.cancel()
            await asyncio.wait([self._next])
        await self._responses.aclose()


def start(number, text="a"):
    request = pb.GenerateRequest(text=text)
    return pb.GenerateMuxRequest(start=pb.MuxStart(id=number, request=request)).SerializeToString()


def cancel(number):
    return pb.GenerateMuxRequest(cancel=pb.MuxCancel(id=number)).SerializeToString()


def test_one_message_has_all_that_gathered():
    async def run():
        opened = Opened()
        await opened.send(start(7), start(9))
        first, second = opened.begun.streams
        for token in (1, 2):
            first.put(token)
            second.put(token + 10)
        second.end(Verdict.LENGTH)
        assert await opened.events() == [(7, "delta", [1, 2]), (9, "delta", [11, 12]), (9, "finish", None)]
        first.end(RequestError(Reason.CORE_LOST, "gone"))
        assert await opened.events() == [(7, "error", 14)]
        await opened.send(None)
        with pytest.raises(StopAsyncIteration):
            await opened.events()
        assert opened.begun.closed == {0, 1}

    asyncio.run(run())


def test_a_cancel_before_the_core_has_it():
    async def run():
        opened = Opened()
        opened.begun.gate = asyncio.Event()
        await opened.send(start(1), cancel(1), start(1))
        opened.begun.gate.set()
        await opened.send()
        assert await opened.events() == [(1, "error", 3)]  # in use: its end was not told yet
        assert opened.begun.streams == []
        await opened.send(start(1))
        opened.begun.streams[0].put(4)
        assert await opened.events() == [(1, "delta", [4])]
        await opened.close()
        assert opened.begun.closed == {0}

    asyncio.run(run())


def test_a_cancelled_request_says_nothing_more():
    async def run():
        opened = Opened()
        await opened.send(start(1))
        await opened.send(cancel(1))
        assert opened.begun.closed == {0}
        opened.begun.streams[0].put(4)  # was on its way
        assert await opened.events() == [(1, "error", 1)]
        await opened.send(start(2))
        opened.begun.streams[1].put(5)
        assert await opened.events() == [(2, "delta", [5])]
        await opened.close()

    asyncio.run(run())


def test_a_bug_is_hidden_and_ends_only_its_request(caplog):
    async def run():
        opened = Opened()
        await opened.send(start(1, "bug"), start(2))
        opened.begun.streams[0].put(5)
        assert await opened.events() == [(1, "error", 13)]
        assert await opened.events() == [(2, "delta", [5])]
        await opened.close()

    asyncio.run(run())
    assert "bug in GenerateRequest: KeyError" in caplog.text
    assert "secret" not in caplog.text


def test_a_message_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(mux, "_MESSAGE_TOKENS", 10)

    async def run():
        opened = Opened()
        await opened.send(*(start(number) for number in range(5)))
        for stream in opened.begun.streams:
            for token in range(6):
                stream.put(token)
        messages = [[number for number, _, _ in await opened.events()] for _ in range(3)]
        assert messages == [[0, 1], [2, 3], [4]]
        await opened.close()

    asyncio.run(run())


def test_refusals_that_nobody_reads_are_bounded(monkeypatch):
    monkeypatch.setattr(mux, "MAX_REQUESTS", 2)
    monkeypatch.setattr(mux, "_MAX_UNREAD", 4)

    async def run():
        opened = Opened()
        await opened.send(*(start(number) for number in range(100)))
        assert await opened.events() == [(2, "error", 8), (3, "error", 8)]
        assert len(opened.begun.streams) == 2
        assert [number for number, _, _ in await opened.events()] == [4, 5]
        await opened.close()
        assert opened.begun.closed == {0, 1}

    asyncio.run(run())
