"""Every kind of bad request: its status, the field it names, and a neighbour that goes on unharmed."""

import collections
import math
import random

import grpc
import pytest

from baton.inference.v1 import inference_pb2 as pb
from baton.inference.v1 import inference_pb2_grpc as rpc
from tests.support.calls import expected, failure_of, generate, ids_request
from tests.support.checkpoints import write_checkpoint
from tests.support.stack import SERVICE, start_stack

INVALID = grpc.StatusCode.INVALID_ARGUMENT
SECRET = "a secret of the user"


@pytest.fixture(scope="module")
def channel(stack):
    with stack.channel() as channel:
        yield channel


@pytest.fixture(scope="module", autouse=True)
def neighbour(stack):
    """A stream that runs during all of these tests; checked at the end, token by token."""
    request = ids_request([2, 7, 1], seed=8, max_tokens=2500, ignore_eos=True)
    with stack.channel() as channel:
        call = rpc.InferenceServiceStub(channel).Generate(request)
        events = [next(call)]
        yield
        events += call
    tokens = [token for event in events for token in event.delta.token_ids]
    assert tokens == expected([2, 7, 1], request).tokens


def request_with(sampling=None, stopping=None, **prompt):
    return pb.GenerateRequest(
        sampling=pb.Sampling(**(sampling or {})),
        stopping=pb.Stopping(**(stopping or {})),
        **(prompt or {"text": SECRET}),
    )


def messages(*pairs):
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in pairs])


def ids(*values):
    return pb.TokenIds(ids=values)


BAD = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "empty text": (request_with(text=""), "text"),
    "empty ids": (request_with(token_ids=ids()), "token_ids.ids"),
    "empty conversation": (request_with(chat=pb.Chat()), "chat.messages"),
    "unknown role": (request_with(chat=messages(("user", "x"), ("robot", SECRET))), "chat.messages[1].role"),
    "a role that the template refuses": (request_with(chat=messages(("tool", SECRET))), "chat.messages"),
    "id at the vocabulary": (request_with(token_ids=ids(1, 1279, 1280)), "token_ids.ids[2]"),
    "largest id": (request_with(token_ids=ids(2**32 - 1)), "token_ids.ids[0]"),
    "prompt fills the model": (request_with(token_ids=ids(*[1] * 4096)), "token_ids"),
    "text fills the model": (request_with(text="word " * 5000), "text"),
    "output beyond the model": (
        request_with(token_ids=ids(*[1] * 4000), stopping={"max_tokens": 97}),
        "stopping.max_tokens",
    ),
    "largest max_tokens": (request_with(stopping={"max_tokens": 2**32 - 1}), "stopping.max_tokens"),
    "max_tokens 0": (request_with(stopping={"max_tokens": 0}), "stopping.max_tokens"),
    "min above max": (request_with(stopping={"max_tokens": 3, "min_tokens": 4}), "stopping.min_tokens"),
    "min beyond the model": (request_with(stopping={"min_tokens": 5000}), "stopping.min_tokens"),
    "temperature NaN": (request_with({"temperature": math.nan}), "sampling.temperature"),
    "temperature negative": (request_with({"temperature": -0.5}), "sampling.temperature"),
    "temperature infinite": (request_with({"temperature": math.inf}), "sampling.temperature"),
    "temperature above 100": (request_with({"temperature": 101}), "sampling.temperature"),
    "top_p 0": (request_with({"top_p": 0}), "sampling.top_p"),
    "top_p 2": (request_with({"top_p": 2}), "sampling.top_p"),
    "top_p NaN": (request_with({"top_p": math.nan}), "sampling.top_p"),
    "min_p 2": (request_with({"min_p": 2}), "sampling.min_p"),
    "17 stop ids with the model's": (
        request_with(stopping={"stop_token_ids": range(15)}),
        "stopping.stop_token_ids",
    ),
    "stop id beyond the vocabulary": (
        request_with(stopping={"stop_token_ids": [5, 1280]}),
        "stopping.stop_token_ids[1]",
    ),
    "17 stop strings": (request_with(stopping={"stop": ["x"] * 17}), "stopping.stop"),
    "empty stop string": (request_with(stopping={"stop": ["x", ""]}), "stopping.stop[1]"),
    "long stop string": (request_with(stopping={"stop": ["x" * 257]}), "stopping.stop[0]"),
}
TOO_LONG = {
    "prompt fills the model",
    "text fills the model",
    "output beyond the model",
    "largest max_tokens",
    "min beyond the model",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_named(channel, name):
    request, field = BAD[name]
    with pytest.raises(grpc.RpcError) as caught:
        generate(channel, request)
    failure = failure_of(caught.value)
    assert failure.code is INVALID
    assert failure.field.removesuffix(".ids") == field.removesuffix(".ids")
    assert failure.reason == ("TOO_LONG" if name in TOO_LONG else "INVALID_FIELD")
    assert failure.message.startswith(failure.field)
    assert failure.retry_ms is None
    assert SECRET not in failure.message


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.TokenizeRequest(), "prompt"),
        (pb.TokenizeRequest(text=""), "text"),
        (pb.TokenizeRequest(chat=pb.Chat()), "chat.messages"),
        (pb.TokenizeRequest(chat=messages(("me", "x"))), "chat.messages[0].role"),
    ],
)
def test_tokenize_names_bad_fields(channel, request_, field):
    with pytest.raises(grpc.RpcError) as caught:
        rpc.InferenceServiceStub(channel).Tokenize(request_)
    failure = failure_of(caught.value)
    assert (failure.code, failure.field) == (INVALID, field)


MALFORMED = [b"\xff", b"\x0a\xff", b"\x08", b"\x0a\x05abc", bytes(range(1, 99))]
NOT_UTF8 = b"\x0a\x02\xff\xfe"
BROKEN_INSIDE = b"\x12\x03\x0a\x01\x80"


@pytest.mark.parametrize(
    ("method", "data"),
    [
        *(("Generate", data) for data in (*MALFORMED, NOT_UTF8, BROKEN_INSIDE)),
        *(("Tokenize", data) for data in (*MALFORMED, NOT_UTF8, BROKEN_INSIDE)),
        *(("GetModel", data) for data in MALFORMED),
    ],
)
def test_malformed_bytes(channel, method, data):
    make = channel.unary_stream if method == "Generate" else channel.unary_unary
    call = make(f"/{SERVICE}/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        list(call(data))
    failure = failure_of(caught.value)
    assert (failure.code, failure.reason) == (INVALID, "MALFORMED_REQUEST")
    assert failure.message == f"the bytes sent are no baton.inference.v1.{method}Request"


def mutated(choice, data):
    """The bytes with a few of them changed, removed or doubled."""
    data = bytearray(data)
    for _ in range(choice.randint(1, 4)):
        place = choice.randrange(len(data))
        match choice.randrange(3):
            case 0:
                data[place] = choice.randrange(256)
            case 1:
                del data[place : place + choice.randint(1, 8)]
            case _:
                data[place:place] = data[place : place + choice.randint(1, 8)]
        if not data:
            return b""
    return bytes(data)


def test_500_mutants(stack, channel):
    """Whatever arrives, the answer is a stream or says what is wrong with the request."""
    choice = random.Random(3)
    originals = [
        request_with(
            {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 7},
            {
                "max_tokens": 9,
                "min_tokens": 2,
                "stop": ["ab", "cd"],
                "stop_token_ids": [1, 2],
                "ignore_eos": True,
            },
            **prompt,
        ).SerializeToString()
        for prompt in (
            {"text": "hello"},
            {"token_ids": ids(1, 200, 1000)},
            {"chat": messages(("system", "short"), ("user", "hi"))},
        )
    ]
    generate_raw = channel.unary_stream(f"/{SERVICE}/Generate")
    calls = [generate_raw(mutated(choice, choice.choice(originals)), timeout=30.0) for _ in range(500)]
    reasons: collections.Counter[str] = collections.Counter()
    for call in calls:
        try:
            next(call)
            reasons["answered"] += 1
            call.cancel()
        except grpc.RpcError as error:
            failure = failure_of(error)
            assert failure.code is INVALID, failure
            reasons[failure.reason] += 1
    assert set(reasons) - {"TOO_LONG"} == {"answered", "MALFORMED_REQUEST", "INVALID_FIELD"}


def test_a_message_beyond_the_limit(channel):
    with pytest.raises(grpc.RpcError) as caught:
        generate(channel, request_with(text="x" * (17 << 20)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_unknown_method(channel):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_edges_are_taken(channel):
    """One step inside each limit."""
    edges = request_with(
        {"temperature": 100, "top_p": 1, "min_p": 1, "top_k": 2**32 - 1, "seed": 2**64 - 1},
        {"max_tokens": 96, "min_tokens": 96, "stop": ["x" * 256] * 16, "stop_token_ids": range(14)},
        token_ids=ids(*[1279] * 4000),
    )
    answer = generate(channel, edges)
    assert len(answer.tokens) == 96


def test_no_chat_template(tmp_path):
    model = write_checkpoint(tmp_path / "plain", chat_template=None)
    with start_stack(model=model) as running, running.channel() as channel:
        with pytest.raises(grpc.RpcError) as caught:
            generate(channel, request_with(chat=messages(("user", "x"))))
        failure = failure_of(caught.value)
        assert (failure.code, failure.reason, failure.field) == (INVALID, "NO_CHAT_TEMPLATE", "chat")
        assert not rpc.InferenceServiceStub(channel).GetModel(pb.GetModelRequest()).supports_chat
        assert generate(channel, request_with(text="x", stopping={"max_tokens": 2})).done
