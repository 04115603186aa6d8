"""The blocking and the asyncio client, both held to the same facts, against a server in this process."""

import asyncio
import time

import grpc
import pytest

from baton_client import (
    AsyncClient,
    ChatMessage,
    Client,
    DeadlineError,
    Delta,
    ExhaustedError,
    Finish,
    FinishReason,
    HealthStatus,
    InternalError,
    InvalidArgumentError,
    Sampling,
    UnavailableError,
    Usage,
)
from baton_client.errors import BatonError, error_of
from baton_client.readiness import Wait
from tests.clients.fake_server import fake_server, status

Code = grpc.StatusCode


@pytest.fixture
def server():
    with fake_server() as running:
        yield running


class Blocking:
    """Calls of the blocking client, by name."""

    def __init__(self, address, **options):
        self._client = Client(address, **options)

    def __getattr__(self, name):
        return getattr(self._client, name)

    def events(self, *args, **kwargs):
        return list(self._client.generate(*args, **kwargs))

    def first(self, *args, **kwargs):
        with self._client.generate(*args, **kwargs) as stream:
            return next(stream)


class Asyncio:
    """The same calls of the asyncio client, each on a loop of its own."""

    def __init__(self, address, **options):
        self._address, self._options = address, options

    def __getattr__(self, name):
        async def call(*args, **kwargs):
            async with AsyncClient(self._address, **self._options) as client:
                return await getattr(client, name)(*args, **kwargs)

        return lambda *args, **kwargs: asyncio.run(call(*args, **kwargs))

    def events(self, *args, **kwargs):
        async def collect():
            async with AsyncClient(self._address, **self._options) as client:
                return [event async for event in client.generate(*args, **kwargs)]

        return asyncio.run(collect())

    def first(self, *args, **kwargs):
        async def one():
            async with AsyncClient(self._address, **self._options) as client:
                async with client.generate(*args, **kwargs) as stream:
                    event = await anext(stream)
                await asyncio.sleep(0.05)
                return event

        return asyncio.run(one())


@pytest.fixture(params=[Blocking, Asyncio])
def client(request, server):
    return request.param(server.address)


def test_stream_of_deltas_ends_with_one_finish(client):
    events = client.events("abc", Sampling(max_tokens=4))
    assert events[:-1] == [Delta(text, (ord(text),), index) for index, text in enumerate("abca")]
    assert events[-1] == Finish(FinishReason.LENGTH, Usage(3, 1, 4), None)


def test_complete_collects(client):
    answer = client.complete([1, 2, 3], Sampling(max_tokens=5))
    assert answer.token_ids == (1, 2, 3, 1, 2)
    assert answer.text == "\x01\x02\x03\x01\x02"
    assert answer.finish.reason is FinishReason.LENGTH


def test_every_field_reaches_the_server(client, server):
    client.complete(
        [ChatMessage("system", "be brief"), {"role": "user", "content": "hi"}],
        Sampling(
            temperature=0.0,
            top_k=5,
            top_p=0.5,
            min_p=0.25,
            seed=2**63,
            max_tokens=3,
            min_tokens=2,
            stop="END",
            stop_token_ids=[7, 8],
            ignore_eos=True,
        ),
    )
    request = server.service.requests[-1]
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "be brief"), ("user", "hi")]
    sampling, stopping = request.sampling, request.stopping
    assert sampling.HasField("temperature")
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.0, 5, 0.5, 0.25)
    assert sampling.seed == 2**63
    assert (stopping.max_tokens, stopping.min_tokens, stopping.ignore_eos) == (3, 2, True)
    assert (list(stopping.stop), list(stopping.stop_token_ids)) == (["END"], [7, 8])


def test_unset_fields_stay_unset(client, server):
    client.complete("abc")
    request = server.service.requests[-1]
    assert request.sampling.ListFields() == []
    assert request.stopping.ListFields() == []


def test_tokenize_and_model(client):
    assert client.tokenize("hé").token_ids == tuple("hé".encode())
    assert client.tokenize([{"role": "user", "content": "x"}]).text == "<user>x"
    model = client.model()
    assert (model.name, model.vocab_size, model.eos_token_ids) == ("bytes", 256, (0,))
    assert (model.default_sampling.temperature, model.default_sampling.top_p) == (0.5, 1.0)


def test_health_and_waiting_for_it(client, server):
    assert client.health() is HealthStatus.SERVING
    server.set_health(False)
    assert client.health() is HealthStatus.NOT_SERVING
    with pytest.raises(UnavailableError, match=r"not ready after 0\.2 s: not serving"):
        client.wait_ready(0.2)
    server.set_health(True)
    client.wait_ready(5)


@pytest.mark.parametrize("kind", [Blocking, Asyncio])
def test_nobody_at_the_address(kind):
    client = kind("127.0.0.1:1")
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        client.complete("abc")
    assert caught.value.code is Code.UNAVAILABLE
    with pytest.raises(UnavailableError, match="not ready after"):
        client.wait_ready(0.2)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("kind", [Blocking, Asyncio])
def test_waiting_ends_early_where_nobody_listens(kind):
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"^no server answers at 127\.0\.0\.1:1, .*refused") as caught:
        kind("127.0.0.1:1").wait_ready(60, absent_s=0.5)
    assert caught.value.code is Code.UNAVAILABLE
    assert 0.4 < time.monotonic() - started < 10


def test_a_server_that_is_there_and_not_ready_is_waited_for(client, server):
    server.set_health(False)
    with pytest.raises(UnavailableError, match="is not ready after 1 s: not serving"):
        client.wait_ready(1, absent_s=0.1)


def test_only_time_on_end_with_nobody_there_counts():
    wait, refused = Wait("a:1", 60.0, 3.0, 100.0), UnavailableError("refused")
    assert not wait.is_over(refused, 102.9)
    assert not wait.is_over(HealthStatus.NOT_SERVING, 103.5)
    assert not wait.is_over(refused, 106.4)
    assert not wait.is_over(DeadlineError("silent"), 107.0)
    assert not wait.is_over(refused, 109.9)
    assert wait.is_over(HealthStatus.SERVING, 109.9)
    with pytest.raises(UnavailableError, match=r"^no server answers at a:1, tried for 3 s: refused$"):
        wait.is_over(refused, 110.0)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    "address", ["localhost", "127.0.0.1:0", "127.0.0.1:99999", "", "::1:50051", "ipv6:::1:50051"]
)
def test_an_address_without_a_port_is_refused(kind, address):
    with pytest.raises(InvalidArgumentError, match=r"HOST:PORT \(IPv6 as \[::1\]:PORT\)$") as caught:
        kind(address)
    assert caught.value.field == "address"


def test_an_early_end_cancels_the_call(client, server):
    server.service.token_delay_s = 0.01
    assert isinstance(client.first("abc", Sampling(max_tokens=100_000)), Delta)
    deadline = time.monotonic() + 5
    while server.service.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.service.running == 0


def test_dropping_the_iterator_cancels_the_call(server):
    server.service.token_delay_s = 0.01
    with Client(server.address) as client:
        for _ in client.generate("abc", Sampling(max_tokens=100_000)):
            break
        deadline = time.monotonic() + 5
        while server.service.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.service.running == 0


def test_cancelling_the_task_cancels_the_call(server):
    server.service.token_delay_s = 0.01

    async def scenario():
        async with AsyncClient(server.address) as client:
            task = asyncio.create_task(client.complete("abc", Sampling(max_tokens=100_000)))
            while not server.service.running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(500):
                if not server.service.running:
                    return
                await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert server.service.running == 0


def test_deadline(client, server):
    server.service.token_delay_s = 0.05
    with pytest.raises(DeadlineError):
        client.complete("abc", Sampling(max_tokens=1000), timeout_s=0.2)


def test_invalid_argument_names_the_field(client, server):
    server.service.failures = [
        status(
            Code.INVALID_ARGUMENT,
            "text: too long",
            reason="INVALID_REQUEST",
            field="text",
            metadata={"limit": "8"},
        )
    ]
    with pytest.raises(InvalidArgumentError, match="too long") as caught:
        client.complete("abc")
    error = caught.value
    assert (error.field, error.reason, dict(error.metadata)) == ("text", "INVALID_REQUEST", {"limit": "8"})
    assert isinstance(error, ValueError)
    assert len(server.service.requests) == 1  # a broken rule is not tried again


def test_a_burst_is_bridged_by_retries(client, server):
    full = status(Code.RESOURCE_EXHAUSTED, "queue full", reason="QUEUE_FULL", retry_after_s=0.25)
    server.service.failures = [full, full]
    assert client.complete("abc", Sampling(max_tokens=1)).token_ids == (97,)
    assert len(server.service.requests) == 3


def test_retries_end(client, server):
    server.service.failures = [
        status(Code.RESOURCE_EXHAUSTED, "queue full", reason="QUEUE_FULL", retry_after_s=0.25)
        for _ in range(9)
    ]
    with pytest.raises(ExhaustedError) as caught:
        client.complete("abc")
    assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 0.25)
    assert len(server.service.requests) == 4


@pytest.mark.parametrize("kind", [Blocking, Asyncio])
def test_retries_can_be_turned_off(kind, server):
    server.service.failures = [status(Code.UNAVAILABLE, "draining", reason="DRAINING")]
    with pytest.raises(UnavailableError, match="draining"):
        kind(server.address, retries=False).complete("abc")
    assert len(server.service.requests) == 1


def test_nothing_is_repeated_after_the_first_event(client, server):
    server.service.failure_after = (2, status(Code.UNAVAILABLE, "lost the worker", reason="WORKER_LOST"))
    with pytest.raises(UnavailableError) as caught:
        client.events("abcdef")
    assert caught.value.reason == "WORKER_LOST"
    assert len(server.service.requests) == 1


def test_a_stream_without_finish_is_an_error(client, server):
    server.service.forget_finish = True
    with pytest.raises(InternalError, match="without a finish"):
        client.events("abc")


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([], "prompt"),
        (b"bytes", "prompt"),
        (None, "prompt"),
        ([1, -1], "token_ids"),
        ([1, 2**32], "token_ids"),
        ([1, "a"], "token_ids"),
        ("\ud800", "text"),
        ([{"role": "user"}], "chat.messages[0]"),
        ([{"role": "user", "content": 7}], "chat.messages[0].content"),
        ([{"role": "user", "content": "a"}, 3], "chat.messages[1]"),
    ],
)
def test_a_prompt_of_the_wrong_form_is_named(client, prompt, field):
    with pytest.raises(InvalidArgumentError) as caught:
        client.complete(prompt)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        [("grpc-status-details-bin", b"\xff\xff\xff")],
        [("grpc-status-details-bin", b"\x1a\x02\x0a\xff")],
        [("other", "x"), ("grpc-status-details-bin", "text")],
    ],
)
def test_details_that_cannot_be_read_are_left_out(broken):
    error = error_of(Code.UNAVAILABLE, "away", broken)
    assert (type(error), error.message, error.reason) == (UnavailableError, "away", "")


@pytest.mark.parametrize("code", list(Code))
def test_every_status_has_an_exception(code):
    error = error_of(code, None, None)
    assert isinstance(error, BatonError)
    assert error.code is code
    assert str(error)


def test_many_streams_share_one_connection(server):
    """No limit on concurrent streams gets in the way of one process with many requests."""
    server.service.token_delay_s = 0.02

    async def scenario():
        async with AsyncClient(server.address) as client:
            calls = [client.complete([index], Sampling(max_tokens=10)) for index in range(60)]
            return await asyncio.gather(*calls)

    answers = asyncio.run(scenario())
    assert [answer.token_ids for answer in answers] == [(index,) * 10 for index in range(60)]
    assert server.service.peak >= 50
