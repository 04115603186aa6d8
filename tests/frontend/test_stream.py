"""Streams that share a writer: it is told once for all that gathers, and of nothing twice."""

from baton_wire.frontend import Verdict
from scheduler_svc.frontend.errors import Reason, RequestError
from scheduler_svc.frontend.stream import GatheredStream


def gathered():
    told: list[int] = []
    return GatheredStream(5, lambda: told.append(1)), told


def test_a_writer_is_told_once_until_it_collects():
    stream, told = gathered()
    for token in (1, 2, 3):
        stream.put(token)
    assert told == [1]
    assert stream.collect() == ([1, 2, 3], None)
    assert stream.collect() == ([], None)
    stream.put(4)
    assert told == [1, 1]
    assert stream.collect() == ([4], None)


def test_the_end_comes_with_the_tokens_before_it():
    stream, told = gathered()
    stream.put(1)
    stream.end(Verdict.STOP)
    assert (told, stream.is_over) == ([1], True)
    assert stream.collect() == ([1], Verdict.STOP)


def test_an_end_without_tokens_is_told():
    stream, told = gathered()
    stream.end(Verdict.LENGTH)
    assert told == [1]
    stream.end(RequestError(Reason.CORE_LOST, "late"))
    assert told == [1]
    assert stream.collect() == ([], Verdict.LENGTH)  # the first counts
