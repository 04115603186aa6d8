"""Both faces of a mux stream, held to the same facts, against a server in this process."""

import asyncio
import socket
import time

import grpc
import pytest

from baton_client import (
    AsyncClient,
    BatonError,
    CallCancelledError,
    Client,
    DeadlineError,
    Delta,
    ExhaustedError,
    Finish,
    FinishReason,
    InvalidArgumentError,
    Sampling,
    UnavailableError,
    Usage,
)
from baton_client.pump import Progress, RequestPump
from tests.clients.fake_server import fake_server, status

Code = grpc.StatusCode


@pytest.fixture
def server():
    with fake_server() as running:
        yield running


def blocking(address, act, **options):
    """The batches of a stream that `act` was asked for things on."""
    with Client(address, **options) as client, client.mux() as mux:
        act(mux)
        mux.done()
        return list(mux)


def on_a_loop(address, act, **options):
    """The same on a loop of its own."""

    async def run():
        async with AsyncClient(address, **options) as client, client.mux() as mux:
            act(mux)
            mux.done()
            return [batch async for batch in mux]

    return asyncio.run(run())


@pytest.fixture(params=[blocking, on_a_loop])
def batches(request):
    return request.param


def test_events_come_under_their_numbers(batches, server):
    def act(mux):
        mux.start(2**64 - 1, "abc", Sampling(max_tokens=4))
        mux.start(0, [1, 2], Sampling(max_tokens=1))

    first, second = batches(server.address, act)
    assert {number for number, _ in first} == {2**64 - 1}
    deltas = [Delta(text, (ord(text),), index) for index, text in enumerate("abca")]
    assert [event for _, event in first] == [*deltas, Finish(FinishReason.LENGTH, Usage(3, 1, 4), None)]
    assert [event.token_ids for _, event in second if isinstance(event, Delta)] == [(1,)]


def test_a_cancel_reaches_the_server(batches, server):
    batches(server.address, lambda mux: mux.cancel(7))
    assert server.service.requests[-1].cancel.id == 7


def test_a_cancel_after_done_still_ends_its_request(batches, stack):
    """Of two that run; the stream ends with the last of them."""
    seen, long = [], Sampling(max_tokens=1500, ignore_eos=True)

    def act(mux):
        mux.start(1, "A plan is", long)
        mux.start(2, "A slot is", Sampling(max_tokens=40, ignore_eos=True))
        mux.done()
        with pytest.raises(BatonError, match="request 3 was started after done"):
            mux.start(3, "Too late", long)
        mux.cancel(1)

    for batch in batches(stack.address, act):
        seen += batch
    ends = {number: event for number, event in seen if not isinstance(event, Delta)}
    assert isinstance(ends[1], CallCancelledError) and isinstance(ends[2], Finish)


def test_an_error_is_an_event_with_all_its_details(batches, server):
    server.service.failures = [
        status(Code.INVALID_ARGUMENT, "top_p: no", reason="INVALID_FIELD", field="sampling.top_p"),
        status(Code.RESOURCE_EXHAUSTED, "full", reason="STREAM_FULL", retry_after_s=0.25),
    ]

    def act(mux):
        for number in range(3):
            mux.start(number, "ab", Sampling(max_tokens=1))

    (bad,), (full,), good = batches(server.address, act)
    assert isinstance(bad[1], InvalidArgumentError)
    assert (bad[0], bad[1].message, bad[1].field) == (0, "top_p: no", "sampling.top_p")
    assert isinstance(full[1], ExhaustedError)
    assert (full[1].reason, full[1].retry_after_s, full[1].code) == (
        "STREAM_FULL",
        0.25,
        Code.RESOURCE_EXHAUSTED,
    )
    assert isinstance(good[-1][1], Finish)


@pytest.mark.parametrize("number", [-1, 2**64])
def test_a_number_that_is_none(batches, server, number):
    with pytest.raises(ValueError, match=str(number)):
        batches(server.address, lambda mux: mux.start(number, "a"))


def test_nobody_there(batches):
    with pytest.raises(UnavailableError):
        batches("127.0.0.1:1", lambda mux: mux.start(1, "a"), retries=False)


def test_its_time_is_over(batches, server):
    server.service.token_delay_s = 0.3
    with pytest.raises(DeadlineError):
        batches(server.address, lambda mux: mux.start(1, "abcdef"), timeout_s=0.2)


def test_who_waits_for_a_stream_to_open_may_be_cancelled():
    async def run(address):
        async with AsyncClient(address) as client:
            mux = client.mux()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(mux.__aenter__(), 0.2)
            assert mux._call.cancelled()

    with socket.create_server(("127.0.0.1", 0)) as mute:
        asyncio.run(run(f"127.0.0.1:{mute.getsockname()[1]}"))


def ends_of(pump, count):
    """The last progress of so many requests, by number."""
    ends: dict[int, Progress] = {}
    while len(ends) < count:
        progress = pump.wait()
        if progress.finish is not None or progress.error is not None:
            ends[progress.number] = progress
    return ends


def test_a_pump_waits_for_room(server):
    server.service.failures = [
        status(Code.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after_s=0.01)
    ] * 3
    pump = RequestPump(server.address, 4)
    for number in range(6):
        pump.submit(number, [1, 2], Sampling(max_tokens=2))
    assert all(end.error is None for end in ends_of(pump, 6).values())
    assert len(server.service.requests) == 9
    pump.close()


def test_a_pump_opens_another_stream_when_one_is_lost(server):
    pump = RequestPump(server.address, 4)
    server.service.token_delay_s = 0.05
    pump.submit(0, [1, 2], Sampling(max_tokens=1000))
    while not server.service.requests:
        time.sleep(0.01)
    pump.cancel()
    server.service.token_delay_s = 0.0
    pump.submit(1, [1, 2], Sampling(max_tokens=3))
    (end,) = ends_of(pump, 1).values()
    assert (end.number, end.error) == (1, None)
    pump.close()
