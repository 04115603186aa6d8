"""Real processes, two groups: every token of every stream is the one that the request alone determines."""

import asyncio
import random

import pytest
from tokenizers import Tokenizer

from baton.inference.v1 import inference_pb2 as pb
from baton.inference.v1 import inference_pb2_grpc as rpc
from baton_wire.result import End
from tests.support.calls import DEMO_EOS, expected, gather, generate, ids_request
from tests.support.demo import DEMO_MODEL
from tests.support.stack import VOCAB_SIZE

REASONS = {End.STOP: pb.FINISH_REASON_STOP, End.LENGTH: pb.FINISH_REASON_LENGTH}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))


@pytest.fixture
def channel(stack):
    with stack.channel() as channel:
        yield channel


def mixed_request(choice):
    """A random request of any form, with a seed and a length so that its tokens are known."""
    request = pb.GenerateRequest(
        sampling=pb.Sampling(seed=choice.getrandbits(64), temperature=choice.choice([0.0, 1.0])),
        stopping=pb.Stopping(
            max_tokens=choice.randint(1, 120),
            min_tokens=choice.choice([0, 0, 1]),
            ignore_eos=choice.random() < 0.2,
            stop_token_ids=choice.sample(range(1000), choice.randint(0, 3)),
        ),
    )
    form = choice.choice(["text", "ids", "chat"])
    words = "".join(
        choice.choice(["plan ", "worker ", "naïve ", "漢字 ", "\n"]) for _ in range(choice.randint(1, 400))
    )
    if form == "text":
        request.text = words
    elif form == "ids":
        request.token_ids.ids.extend(choice.randrange(VOCAB_SIZE) for _ in range(choice.randint(1, 900)))
    else:
        request.chat.messages.add(role="system", content="Be brief.")
        request.chat.messages.add(role="user", content=words)
    return request


def prompt_of(stub, request):
    form = request.WhichOneof("prompt")
    if form == "token_ids":
        return list(request.token_ids.ids)
    tokenize = (
        pb.TokenizeRequest(text=request.text) if form == "text" else pb.TokenizeRequest(chat=request.chat)
    )
    return list(stub.Tokenize(tokenize).token_ids)


def test_64_mixed_requests_at_once(stack, channel, tokenizer):
    choice = random.Random(7)
    requests = [mixed_request(choice) for _ in range(64)]
    stub = rpc.InferenceServiceStub(channel)
    prompts = [prompt_of(stub, request) for request in requests]
    answers = asyncio.run(gather(stack.address, requests))
    ends = set()
    for request, prompt, answer in zip(requests, prompts, answers, strict=True):
        wanted = expected(prompt, request)
        assert answer.tokens == wanted.tokens
        assert answer.finish.reason == REASONS[wanted.end]
        assert answer.finish.usage.prompt_tokens == len(prompt)
        assert answer.text == tokenizer.decode(wanted.tokens)
        ends.add(wanted.end)
    assert ends == set(REASONS)


def test_both_groups_work(stack):
    requests = [ids_request([n + 1] * 40, seed=n, max_tokens=400, ignore_eos=True) for n in range(16)]

    async def watch():
        running = asyncio.create_task(gather(stack.address, requests))
        most = dict.fromkeys(stack.workers, 0)
        while not running.done():
            state = await asyncio.to_thread(stack.state)
            for name, group in state["groups"].items():
                most[name] = max(most[name], group["running"])
        return most, await running

    most, answers = asyncio.run(watch())
    assert set(most.values()) == {8}, most
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens == expected(list(request.token_ids.ids), request).tokens


def test_streams_token_by_token(channel):
    """Not all at the end: what has gathered is sent as it comes."""
    answer = generate(channel, ids_request([1, 2, 3], max_tokens=100, ignore_eos=True))
    assert answer.deltas > 20


@pytest.mark.parametrize("length", [200, 192])
def test_a_prompt_seen_before_comes_from_the_cache(channel, length):
    """Its whole blocks of 16: to its end or not."""
    prompt = [random.Random(length).randrange(VOCAB_SIZE) for _ in range(length)]
    # Both groups get to know it, whichever takes the next.
    first = [generate(channel, ids_request(prompt, max_tokens=2, ignore_eos=True)) for _ in range(4)]
    again = generate(channel, ids_request(prompt, max_tokens=2, ignore_eos=True))
    assert first[0].finish.usage.cached_tokens == 0
    assert again.finish.usage.cached_tokens == 192
    assert again.tokens == first[0].tokens


def test_an_unset_seed_is_drawn(channel):
    request = ids_request([5, 6], max_tokens=8, ignore_eos=True)
    request.sampling.ClearField("seed")
    answers = [generate(channel, request).tokens for _ in range(3)]
    assert len(set(map(tuple, answers))) == 3


def test_an_unset_length_is_what_the_context_leaves(channel):
    prompt = [1] * 4090
    answer = generate(
        channel, pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), stopping=pb.Stopping(ignore_eos=True))
    )
    assert len(answer.tokens) == 6
    assert answer.finish.reason == pb.FINISH_REASON_LENGTH


def test_stop_tokens_are_delivered_and_special_text_is_not(channel, tokenizer):
    request = next(
        r
        for seed in range(1000)
        if expected([9], r := ids_request([9], seed=seed, max_tokens=60)).tokens[-1] in DEMO_EOS
    )
    answer = generate(channel, request)
    assert answer.tokens[-1] in DEMO_EOS
    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert answer.finish.matched_stop == ""
    assert answer.text == tokenizer.decode(answer.tokens[:-1])


def test_a_stop_string_ends_text_and_tokens(stack, channel, tokenizer):
    request = ids_request([4, 5], seed=11, max_tokens=300, ignore_eos=True)
    tokens = expected([4, 5], request).tokens
    whole = tokenizer.decode(tokens)
    stop = next(whole[n : n + 6] for n in range(200, 400) if whole.isascii() or whole[n : n + 6].isascii())
    request.stopping.stop.extend([stop, "never said \N{SNOWMAN}"])
    answer = generate(channel, request)
    assert answer.finish.matched_stop == stop
    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert answer.text == whole[: whole.index(stop)]
    count = len(answer.tokens)
    assert answer.tokens == tokens[:count]
    assert stop in tokenizer.decode(tokens[:count])
    assert stop not in tokenizer.decode(tokens[: count - 1])
    stack.wait_idle()


def test_min_tokens_hold_back_the_stop_token(channel):
    request = ids_request([9], seed=2, max_tokens=40, min_tokens=40)
    answer = generate(channel, request)
    assert len(answer.tokens) == 40
    assert answer.tokens == expected([9], request).tokens


def test_get_model(channel):
    model = rpc.InferenceServiceStub(channel).GetModel(pb.GetModelRequest())
    assert (model.max_model_len, model.vocab_size, model.block_size) == (4096, VOCAB_SIZE, 16)
    assert tuple(model.eos_token_ids) == DEMO_EOS
    assert model.supports_chat
    assert model.ready_groups == 2
    assert model.default_max_tokens == 1024
    assert len(model.fingerprint) == 32


def test_tokenize_shows_the_rendered_conversation(channel, tokenizer):
    stub = rpc.InferenceServiceStub(channel)
    reply = stub.Tokenize(
        pb.TokenizeRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
    )
    assert reply.text.endswith("<|im_start|>assistant\n")
    assert list(reply.token_ids) == tokenizer.encode(reply.text, add_special_tokens=False).ids
