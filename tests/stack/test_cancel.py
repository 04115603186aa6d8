"""Whoever leaves, and whenever: nothing of the request stays behind, and its neighbours never notice."""

import asyncio
import time

import grpc
import pytest

from baton.inference.v1 import inference_pb2_grpc as rpc
from tests.support.calls import Answer, collect, expected, generate, ids_request
from tests.support.processes import wait_until
from tests.support.stack import start_stack

STEP_MS = 4
# One group with 4 slots that computes 64 tokens a step: prompts take long, and a fifth request waits.
WORKER = (
    "--max-num-seqs=4",
    f"--step-us={STEP_MS * 1000}",
    "--max-num-batched-tokens=64",
    "--num-kvcache-blocks=1024",
)


@pytest.fixture(scope="module")
def small():
    with start_stack(worker_args=WORKER) as running:
        yield running
        running.wait_idle()
        assert "bug in" not in running.scheduler.err
        assert "Traceback" not in running.scheduler.err


@pytest.fixture
def channel(small):
    with small.channel() as channel:
        yield channel


@pytest.fixture
def neighbour(small):
    """A stream that runs all the while; checked at the end, token by token."""
    request = ids_request([3, 1, 4], seed=15, max_tokens=3000, ignore_eos=True)
    with small.channel() as channel:
        call = rpc.InferenceServiceStub(channel).Generate(request)
        tokens = list(next(call).delta.token_ids)
        begun = time.monotonic()
        yield
        steps = int((time.monotonic() - begun) * 1000 / STEP_MS)
        while len(tokens) < min(
            steps // 4, 2900
        ):  # it went on all the while, at a quarter of its pace or more
            tokens += next(call).delta.token_ids
        call.cancel()
    assert tokens == expected([3, 1, 4], request, stop_id=None).tokens[: len(tokens)]


def counts(stack):
    (group,) = stack.state()["groups"].values()
    return group


def long_request(seed, prompt_tokens=8):
    return ids_request([seed + 1] * prompt_tokens, seed=seed, max_tokens=2000, ignore_eos=True)


def wait_running(stack, running, waiting=0):
    wait_until(
        lambda: (counts(stack)["running"], counts(stack)["waiting"]) == (running, waiting),
        why=f"{running} running and {waiting} waiting",
    )


def test_cancel_while_waiting(small, channel, neighbour):
    stub = rpc.InferenceServiceStub(channel)
    calls = [stub.Generate(long_request(n)) for n in range(6)]
    wait_running(small, running=4, waiting=3)
    waiting = calls[3:]
    for call in waiting:
        call.cancel()
    wait_running(small, running=4, waiting=0)
    for call in calls:
        call.cancel()
    wait_running(small, running=1)


def test_cancel_while_its_prompt_is_computed(small, channel, neighbour):
    """3,000 tokens at 64 a step take 190 ms and more."""
    call = rpc.InferenceServiceStub(channel).Generate(long_request(1, prompt_tokens=1900))
    wait_running(small, running=2)
    assert counts(small)["referenced"] > 4
    call.cancel()
    wait_running(small, running=1)


def test_cancel_while_it_runs(small, channel, neighbour):
    call = rpc.InferenceServiceStub(channel).Generate(long_request(2))
    next(call)
    call.cancel()
    wait_running(small, running=1)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED


def test_cancel_at_once(small, channel, neighbour):
    stub = rpc.InferenceServiceStub(channel)
    for n in range(50):
        call = stub.Generate(long_request(n, prompt_tokens=200))
        if n % 2:
            time.sleep(0.001 * (n % 10))
        call.cancel()
    wait_running(small, running=1)


def test_a_connection_that_breaks(small, neighbour):
    channel = small.channel()
    calls = [rpc.InferenceServiceStub(channel).Generate(long_request(n)) for n in range(3)]
    wait_running(small, running=4)
    channel.close()
    wait_running(small, running=1)
    assert len(calls) == 3


NARROW = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.lookahead_bytes", 1024),
    ("grpc.http2.bdp_probe", 0),
]


def test_a_client_that_reads_late(small):
    """Its window is full, so its writer waits: what gathers meanwhile comes in few messages, and complete."""
    request = ids_request([5], seed=3, max_tokens=1200, ignore_eos=True)
    with grpc.insecure_channel(small.address, options=NARROW) as channel:
        call = rpc.InferenceServiceStub(channel).Generate(request)
        wait_running(small, running=1)
        small.wait_idle()  # the work is done, whoever reads
        answer = Answer()
        for event in call:
            answer.add(event)
    assert answer.tokens == expected([5], request, stop_id=None).tokens
    assert answer.deltas < 600


def test_a_client_that_leaves_without_reading(small, neighbour):
    """gRPC raises an error of its own in a writer that waits for the client."""
    with grpc.insecure_channel(small.address, options=NARROW) as channel:
        calls = [rpc.InferenceServiceStub(channel).Generate(long_request(n)) for n in range(3)]
        time.sleep(3.0)
        for call in calls:
            call.cancel()
        wait_running(small, running=1)


@pytest.mark.parametrize("prompt_tokens", [8, 1900])
def test_a_deadline_that_passes(small, channel, neighbour, prompt_tokens):
    begun = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        generate(channel, long_request(3, prompt_tokens), timeout_s=0.15)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - begun < 2.0
    wait_running(small, running=1)


def test_a_stop_string_ends_the_work(small, channel, neighbour):
    request = long_request(4)
    request.stopping.stop.append("e")
    answer = generate(channel, request)
    assert answer.finish.matched_stop == "e"
    assert len(answer.tokens) < 1000
    wait_running(small, running=1)


def test_a_cancelled_request_stops_within_a_step(small, channel):
    """Blocks are free again after the plans in flight, not after its length."""
    call = rpc.InferenceServiceStub(channel).Generate(long_request(5))
    next(call)
    begun = time.monotonic()
    call.cancel()
    small.wait_idle()
    # The poll itself takes tens of milliseconds; 2,000 tokens would take 8 seconds.
    assert time.monotonic() - begun < 1.0


def test_500_short_lives(small):
    """Requests that end or leave at random moments, 40 at a time; all that end are right."""

    async def one(stub, gate, n):
        async with gate:
            request = ids_request([n % 7 + 1] * (n % 90 + 1), seed=n, max_tokens=n % 12 + 1, ignore_eos=True)
            call = stub.Generate(request)
            if n % 3:
                answer = await collect(call)
                assert answer.tokens == expected(list(request.token_ids.ids), request, stop_id=None).tokens
            else:
                await asyncio.sleep(n % 20 * 0.002)
                call.cancel()

    async def all_of_them():
        gate = asyncio.Semaphore(40)
        async with grpc.aio.insecure_channel(small.address) as channel:
            stub = rpc.InferenceServiceStub(channel)
            await asyncio.gather(*(one(stub, gate, n) for n in range(500)))

    asyncio.run(all_of_them())
    small.wait_idle()
