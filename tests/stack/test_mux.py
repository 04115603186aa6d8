"""Many requests over one stream: every token is right, and what becomes of one is no other's business."""

import asyncio
import itertools
import queue
import random
from contextlib import suppress

import grpc
import pytest
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from baton.inference.v1 import inference_pb2 as pb
from baton.inference.v1 import inference_pb2_grpc as rpc
from baton_wire.result import End
from tests.support.calls import Answer, collect, expected, failure_of, ids_request
from tests.support.processes import wait_until
from tests.support.stack import start_stack

REASONS = {End.STOP: pb.FINISH_REASON_STOP, End.LENGTH: pb.FINISH_REASON_LENGTH}
# Slots for 256 and for those that wait behind them.
WORKER = ("--max-num-seqs=256", "--step-us=2000", "--num-kvcache-blocks=16384", "--stop-id=1279")


@pytest.fixture(scope="module")
def wide():
    with start_stack(worker_args=WORKER) as running:
        yield running
        running.wait_idle()
        assert "bug in" not in running.scheduler.err
        assert "Traceback" not in running.scheduler.err


class Stream:
    """One mux stream of a blocking channel: what was sent, and every event by its id as it comes."""

    def __init__(self, channel):
        self._requests: queue.SimpleQueue[pb.GenerateMuxRequest | None] = queue.SimpleQueue()
        self.call = rpc.InferenceServiceStub(channel).GenerateMux(iter(self._requests.get, None))
        self.answers: dict[int, Answer] = {}
        self.errors: dict[int, pb.MuxError] = {}
        self.messages = 0

    def start(self, number, request):
        """Sends a request; its id may have been used before."""
        self.answers[number] = Answer()
        self.errors.pop(number, None)
        self._requests.put(pb.GenerateMuxRequest(start=pb.MuxStart(id=number, request=request)))

    def cancel(self, number):
        self._requests.put(pb.GenerateMuxRequest(cancel=pb.MuxCancel(id=number)))

    def say(self, message):
        self._requests.put(message)

    def done(self):
        self._requests.put(None)

    def read(self):
        """Takes one message in."""
        response = next(self.call)
        self.messages += 1
        assert response.events, "a message without events"
        for event in response.events:
            assert event.id not in self.errors, "an event after the end"
            if event.WhichOneof("event") == "error":
                assert not self.answers[event.id].done, "an error after the finish"
                self.errors[event.id] = event.error
            else:
                which = event.WhichOneof("event")
                self.answers[event.id].add(pb.GenerateResponse(**{which: getattr(event, which)}))

    def read_until(self, what):
        while not what():
            self.read()

    def read_all(self):
        """To the end of the stream."""
        self.done()
        with suppress(StopIteration):
            while True:
                self.read()
        assert self.call.code() is grpc.StatusCode.OK


@pytest.fixture
def stream(wide):
    with wide.channel() as channel:
        opened = Stream(channel)
        yield opened
        opened.call.cancel()
        opened.done()


def details(error):
    """(code, reason, field, whether to try again) of an error."""
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    assert sum(d.Unpack(kind) for d in error.details for kind in (info, bad, retry)) == len(error.details)
    assert info.domain == "baton"
    field = bad.field_violations[0].field if bad.field_violations else ""
    return error.code, info.reason, field, retry.HasField("retry_delay")


def long_request(seed, prompt_tokens=8):
    return ids_request([seed % 1000 + 1] * prompt_tokens, seed=seed, max_tokens=3000, ignore_eos=True)


def check(answer, request, model_stop=1279):
    want = expected(list(request.token_ids.ids), request, stop_id=model_stop)
    assert answer.tokens == want.tokens
    assert answer.finish.reason == REASONS[want.end]
    assert answer.finish.usage.prompt_tokens == len(request.token_ids.ids)


def test_256_requests_over_one_stream(wide, stream):
    """Every token; and far fewer messages than tokens."""
    choice = random.Random(1)
    requests = {
        number: ids_request(
            [choice.randrange(1200) for _ in range(choice.randint(1, 90))],
            seed=choice.getrandbits(64),
            max_tokens=choice.randint(50, 150),
            ignore_eos=choice.random() < 0.7,
        )
        for number in {choice.getrandbits(64) for _ in range(256)}
    }
    for number, request in requests.items():
        stream.start(number, request)
    stream.read_all()
    for number, request in requests.items():
        check(stream.answers[number], request)
    tokens = sum(len(answer.tokens) for answer in stream.answers.values())
    assert not stream.errors
    assert stream.messages < tokens / 10
    wide.wait_idle()


def test_an_id_is_used_again(stream):
    for seed in range(5):
        request = ids_request([7, 8], seed=seed, max_tokens=20, ignore_eos=True)
        stream.start(3, request)
        stream.read_until(lambda: stream.answers[3].done)
        check(stream.answers[3], request)


def test_the_first_token_does_not_wait(stream):
    """A message of its own, though its request runs long."""
    stream.start(1, long_request(1))
    stream.read()
    assert len(stream.answers[1].tokens) < 20


def test_texts_and_stop_strings_are_those_of_generate(wide, stream):
    requests = [
        pb.GenerateRequest(
            text=text,
            sampling=pb.Sampling(seed=seed),
            stopping=pb.Stopping(max_tokens=200, stop=stop, ignore_eos=True),
        )
        for seed, (text, stop) in enumerate(
            itertools.product(["hello", "A plan is " * 1200], [[], ["e"], ["th", "on"]])
        )
    ]
    requests += [pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))]
    requests[-1].sampling.seed = 5

    async def alone():
        async with grpc.aio.insecure_channel(wide.address) as channel:
            stub = rpc.InferenceServiceStub(channel)
            return [await collect(stub.Generate(request)) for request in requests]

    for number, request in enumerate(requests):
        stream.start(number, request)
    stream.read_all()
    for number, answer in enumerate(asyncio.run(alone())):
        muxed = stream.answers[number]
        assert (muxed.tokens, muxed.text) == (answer.tokens, answer.text)
        assert muxed.finish.matched_stop == answer.finish.matched_stop
        assert muxed.finish.reason == answer.finish.reason
    assert stream.answers[1].finish.matched_stop == "e"


BAD = [
    (pb.GenerateRequest(), "INVALID_FIELD", "prompt"),
    (
        pb.GenerateRequest(text="a", sampling=pb.Sampling(temperature=-1)),
        "INVALID_FIELD",
        "sampling.temperature",
    ),
    (ids_request([1], max_tokens=0), "INVALID_FIELD", "stopping.max_tokens"),
    (ids_request([1, 99999]), "INVALID_FIELD", "token_ids.ids[1]"),
    (ids_request([1] * 5000), "TOO_LONG", "token_ids.ids"),
    (ids_request([1], max_tokens=100_000), "TOO_LONG", "stopping.max_tokens"),
]


def test_errors_beside_good_requests(wide, stream):
    """They say what a call of Generate says."""
    good = {number: ids_request([number], seed=number, max_tokens=60) for number in range(100, 110)}
    for number, request in good.items():
        stream.start(number, request)
    for number, (request, _, _) in enumerate(BAD):
        stream.start(number, request)
    stream.read_all()
    for number, request in good.items():
        check(stream.answers[number], request)
    assert set(stream.errors) == set(range(len(BAD)))
    with wide.channel() as channel:
        for number, (request, reason, field) in enumerate(BAD):
            error = stream.errors[number]
            assert details(error) == (code_pb2.INVALID_ARGUMENT, reason, field, False)
            with pytest.raises(grpc.RpcError) as caught:
                list(rpc.InferenceServiceStub(channel).Generate(request))
            alone = failure_of(caught.value)
            assert (error.message, error.code) == (alone.message, alone.code.value[0])


def test_bytes_that_are_no_request_end_only_theirs(wide):
    """A prompt that is no UTF-8, as a client in another language may send it."""
    good = ids_request([5], seed=3, max_tokens=30)
    broken = pb.GenerateMuxRequest(start=pb.MuxStart(id=77, request=pb.GenerateRequest(text="??")))
    messages = [
        pb.GenerateMuxRequest(start=pb.MuxStart(id=1, request=good)).SerializeToString(),
        broken.SerializeToString().replace(b"??", b"\xff\xfe"),
        b"",  # says nothing
        pb.GenerateMuxRequest(cancel=pb.MuxCancel(id=12345)).SerializeToString(),  # of nobody
    ]
    with wide.channel() as channel:
        path = "/baton.inference.v1.InferenceService/GenerateMux"
        call = channel.stream_stream(path, None, pb.GenerateMuxResponse.FromString)(iter(messages))
        events = [event for response in call for event in response.events]
    errors = {event.id: details(event.error) for event in events if event.HasField("error")}
    assert errors == {77: (code_pb2.INVALID_ARGUMENT, "MALFORMED_REQUEST", "", False)}
    answer = Answer()
    for event in events:
        if event.id == 1:
            which = event.WhichOneof("event")
            answer.add(pb.GenerateResponse(**{which: getattr(event, which)}))
    check(answer, good)


def test_bytes_of_nobody_end_the_stream(wide):
    with wide.channel() as channel:
        path = "/baton.inference.v1.InferenceService/GenerateMux"
        running = pb.GenerateMuxRequest(start=pb.MuxStart(id=1, request=long_request(1))).SerializeToString()
        call = channel.stream_stream(path, None, None)(iter([running, b"\xff\xff\xff"]))
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert failure_of(caught.value).reason == "MALFORMED_REQUEST"
    assert failure_of(caught.value).code is grpc.StatusCode.INVALID_ARGUMENT
    wide.wait_idle()


def test_cancels_beside_others(wide, stream):
    choice = random.Random(2)
    requests = {number: long_request(number) for number in range(64)}
    for number, request in requests.items():
        request.stopping.max_tokens = 400
        stream.start(number, request)
    stream.read_until(lambda: sum(len(answer.tokens) for answer in stream.answers.values()) > 2000)
    left = choice.sample(sorted(requests), 32)
    for number in left:
        stream.cancel(number)
        stream.cancel(number)  # the second is of nobody
    stream.read_all()
    assert set(stream.errors) == set(left)
    for number, request in requests.items():
        if number in left:
            assert details(stream.errors[number]) == (code_pb2.CANCELLED, "CANCELLED", "", False)
            so_far = stream.answers[number].tokens
            assert so_far == expected(list(request.token_ids.ids), request).tokens[: len(so_far)]
            assert len(so_far) < 400
        else:
            check(stream.answers[number], request)
    wide.wait_idle()


def test_cancels_at_once_free_everything(wide, stream):
    """In whatever state a request is, its prompt still being turned into tokens included."""
    for number in range(200):
        request = long_request(number)
        if number % 3 == 0:
            request.text = "A plan is " * 400 * (number % 4)
        stream.start(number, request)
        stream.cancel(number)
    stream.read_until(lambda: len(stream.errors) == 200)
    wide.wait_idle()
    stream.start(1, ids_request([1], seed=2, max_tokens=5))
    stream.read_all()
    check(stream.answers[1], ids_request([1], seed=2, max_tokens=5))


@pytest.mark.parametrize("how", ["cancel", "connection"])
def test_the_end_of_the_stream_ends_all(wide, how):
    with wide.channel() as channel:
        stream = Stream(channel)
        for number in range(256):
            stream.start(number, long_request(number))
        stream.read_until(lambda: all(answer.tokens for answer in stream.answers.values()))
        if how == "cancel":
            stream.call.cancel()
        stream.done()
    wide.wait_idle(3.0)


def test_an_id_in_use_ends_both(wide, stream):
    stream.start(1, long_request(1))
    stream.start(2, request := ids_request([2], seed=2, max_tokens=50))
    stream.read_until(lambda: stream.answers[1].tokens)
    answer = stream.answers[1]
    stream.start(1, long_request(9))
    stream.answers[1] = answer  # what still comes belongs to the first
    stream.read_until(lambda: 1 in stream.errors)
    assert details(stream.errors[1]) == (code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", "start.id", False)
    stream.read_all()
    check(stream.answers[2], request)
    wide.wait_idle()


def test_more_than_a_stream_may_carry(wide, stream):
    """1,024 wait or run; the others are refused, each by itself, and nothing else is the worse for it."""
    long = {number: long_request(number) for number in range(1024)}
    short = {number: ids_request([number % 1000], seed=number, max_tokens=8) for number in range(1024, 1100)}
    for number, request in (long | short).items():
        stream.start(number, request)
    stream.read_until(lambda: short.keys() <= stream.errors.keys())
    for number in short:
        code, reason, _, again = details(stream.errors[number])
        assert (code, reason, again) == (code_pb2.RESOURCE_EXHAUSTED, "STREAM_FULL", True)
    for number in range(4, 1024):
        stream.cancel(number)
    stream.read_until(lambda: len(stream.errors) == 1020 + len(short))
    stream.start(2000, short[1024])
    stream.read_all()
    for number in range(4):
        check(stream.answers[number], long[number])
    check(stream.answers[2000], short[1024])


def test_a_client_that_does_not_read(wide):
    """What gathers comes in few messages once it reads, and is complete; others never notice."""
    narrow = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.lookahead_bytes", 1024),
        ("grpc.http2.bdp_probe", 0),
    ]
    with grpc.insecure_channel(wide.address, options=narrow) as channel, wide.channel() as other:
        late = Stream(channel)
        requests = {number: ids_request([number + 1], seed=number, max_tokens=500) for number in range(64)}
        for number, request in requests.items():
            request.stopping.ignore_eos = True
            late.start(number, request)
        wait_until(lambda: wide.state()["requests"] == 64, why="all at work")
        beside = Stream(other)
        beside.start(0, request := ids_request([3], seed=9, max_tokens=50, ignore_eos=True))
        beside.read_all()
        check(beside.answers[0], request)
        wide.wait_idle()  # the work is done, whoever reads
        late.read_all()
        for number, request in requests.items():
            check(late.answers[number], request)
        assert late.messages < 400


def test_draining_finishes_what_runs():
    with start_stack(worker_args=("--step-us=2000",), scheduler_args=("--drain-grace-s=20",)) as running:
        with running.channel() as channel:
            stream = Stream(channel)
            request = ids_request([1, 2], seed=4, max_tokens=300, ignore_eos=True)
            stream.start(1, request)
            stream.read()
            running.scheduler.process.terminate()
            wait_until(lambda: not running.serving(), why="not serving")
            stream.start(2, request)
            stream.read_all()
            check(stream.answers[1], request, model_stop=None)
            assert details(stream.errors[2]) == (code_pb2.UNAVAILABLE, "DRAINING", "", True)
        assert running.scheduler.wait() == 0
