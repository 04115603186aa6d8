"""The front-end's end of the link, against a core that a test plays."""

import asyncio
import functools
import shutil
import time
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import pytest

from baton_wire.frontend import Submit, Verdict, Withdraw
from baton_wire.plan import SAMPLING
from baton_wire.transport import ipc_endpoint, private_ipc_dir
from scheduler_svc.frontend import core_link
from scheduler_svc.frontend.core_link import CoreLink
from scheduler_svc.frontend.errors import Reason, RequestError
from scheduler_svc.frontend.stream import Stream
from tests.support.fake_core import READY, FakeCore, step, until


def on_loop(test):
    """Runs a coroutine function as a test; a callback that fails beside it fails it."""

    async def watched(arguments, named):
        failures: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        await test(*arguments, **named)
        await asyncio.sleep(0)
        assert failures == []

    @functools.wraps(test)
    def run(*arguments, **named):
        asyncio.run(watched(arguments, named))

    return run


@pytest.fixture
def folder():
    path = private_ipc_dir()
    yield path
    shutil.rmtree(path)


@asynccontextmanager
async def connected(folder):
    async with FakeCore(folder) as core:
        link = CoreLink(ipc_endpoint(folder / "frontends.ipc"), "test", lambda: None)
        link.start()
        try:
            await asyncio.wait_for(link.wait_connected(), 5.0)
            yield core, link
        finally:
            link.close()


@contextmanager
def submit(link, kind=Stream, prompt=(1, 2, 3)):
    sampling = np.zeros((), SAMPLING)
    ids = np.array(prompt, np.int32)
    stream = link.open(kind, ids, max_tokens=9, min_tokens=2, sampling=sampling, stop_ids=(7,))
    try:
        yield stream
    finally:
        link.release(stream)


async def take(stream):
    return await asyncio.wait_for(stream.take(), 5.0)


@on_loop
async def test_handles_begin_again_when_they_run_out(folder, monkeypatch):
    monkeypatch.setattr(core_link, "HANDLES", 3)
    async with connected(folder) as (_, link):
        handles = []
        for _ in range(5):
            with submit(link) as stream:
                handles.append(stream.handle)
        assert handles == [1, 2, 0, 1, 2]


@on_loop
async def test_a_request_and_its_tokens(folder):
    async with connected(folder) as (core, link):
        assert link.service == READY
        with submit(link) as stream:
            (heard,) = await core.hear(Submit)
            assert (heard.prompt.tolist(), heard.max_tokens, heard.min_tokens) == ([1, 2, 3], 9, 2)
            assert (heard.handle, heard.stop_ids) == (stream.handle, (7,))
            handle = stream.handle
            core.say(step([(handle, 5)], started=[(handle, 16)]))
            news = await take(stream)
            assert (news.tokens, news.over, stream.cached_tokens) == ([5], None, 16)
            core.say(step([(handle, 6), (999, 1), (handle, 8)]))
            core.say(step([(handle, 7)], over=[(handle, Verdict.STOP), (999, Verdict.STOP)]))
            tokens: list[int] = []
            while not stream.is_over or len(tokens) < 3:
                tokens += (await take(stream)).tokens
            assert tokens == [6, 8, 7]
        await asyncio.sleep(0.1)
        assert not any(isinstance(message, Withdraw) for message in core.heard)  # it was over


@on_loop
async def test_leaving_early_withdraws(folder):
    async with connected(folder) as (core, link):
        with pytest.raises(KeyError), submit(link) as stream:
            raise KeyError
        (withdrawn,) = await core.hear(Withdraw)
        assert withdrawn.handle == stream.handle
        assert link.open_streams == 0


@on_loop
async def test_cancelling_the_writer_withdraws(folder):
    async def write(link):
        with submit(link) as stream:
            await stream.take()

    async with connected(folder) as (core, link):
        task = asyncio.create_task(write(link))
        await core.hear(Submit)
        task.cancel()
        await core.hear(Withdraw)


@on_loop
async def test_a_lost_session_ends_its_streams(folder):
    async with connected(folder) as (core, link):
        with submit(link) as stream:
            await core.hear(Submit)
            core.forget()
            news = await take(stream)
            assert isinstance(news.over, RequestError)
            assert news.over.reason is Reason.CORE_LOST
        await until(lambda: link.service == READY)  # the next session
        with submit(link) as stream:
            await core.hear(Submit, 2)
            core.say(step([(stream.handle, 4)]))
            assert (await take(stream)).tokens == [4]


@on_loop
async def test_a_silent_core_is_not_relied_on(folder):
    async with connected(folder) as (core, link):
        core.deaf = True
        begun = time.monotonic()
        await until(lambda: link.service is None)
        assert time.monotonic() - begun < 1.5
        core.deaf = False
        await until(lambda: link.service == READY)


@on_loop
async def test_without_a_core_requests_are_refused(folder):
    link = CoreLink(ipc_endpoint(folder / "frontends.ipc"), "test", lambda: None)
    link.start()
    with pytest.raises(RequestError) as caught, submit(link):
        pass
    assert caught.value.reason is Reason.CORE_LOST
    link.close()


@on_loop
async def test_the_first_token_and_the_end_do_not_wait_for_the_pace(folder, monkeypatch):
    monkeypatch.setattr(core_link, "MESSAGES_PER_S", 2)  # half a second for one stream
    async with connected(folder) as (core, link):
        with submit(link) as first, submit(link) as second:
            await core.hear(Submit, 2)
            begun = time.monotonic()
            core.say(step([(first.handle, 1)]))
            assert (await take(first)).tokens == [1]
            core.say(step([(second.handle, 1)]))
            assert (await take(second)).tokens == [1]
            assert time.monotonic() - begun < 0.3
            for token in range(2, 6):
                core.say(step([(first.handle, token)]))
                await asyncio.sleep(0.02)
            assert (await take(first)).tokens == [2, 3, 4, 5]  # gathered meanwhile
            assert 0.7 < time.monotonic() - begun
            core.say(step([(first.handle, 6)], over=[(first.handle, Verdict.LENGTH)]))
            ended = time.monotonic()
            news = await take(first)
            assert (news.tokens, news.over) == ([6], Verdict.LENGTH)
            assert time.monotonic() - ended < 0.3


@on_loop
async def test_failing_all_streams(folder):
    async with connected(folder) as (core, link):
        with submit(link) as stream:
            await core.hear(Submit)
            link.fail_streams(RequestError(Reason.DRAINING, "bye"))
            news = await take(stream)
            assert isinstance(news.over, RequestError)
        await core.hear(Withdraw)
        await asyncio.sleep(0.1)
        assert sum(isinstance(message, Withdraw) for message in core.heard) == 1
