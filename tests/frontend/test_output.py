"""Events of one request: gapless indices, text before the stop string, usage."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.inference.v1 import inference_pb2 as pb
from scheduler_svc.frontend.detokenizer import Detokenization
from scheduler_svc.frontend.output import Output
from tests.support.tokenizers_zoo import byte_level


@functools.cache
def parts():
    tokenizer = byte_level()
    return tokenizer, Detokenization(tokenizer)


def run(chunks, stops=()):
    """(deltas, finish) of a request whose tokens come in `chunks`, cut where the output says so."""
    output = Output(parts()[1].new(), stops, prompt_tokens=3)
    deltas = []
    for place, chunk in enumerate(chunks):
        piece = output.advance(chunk, last=place == len(chunks) - 1)
        if piece is not None:
            deltas.append(pb.Delta())
            piece.write(deltas[-1])
        if output.matched_stop is not None:
            break
    return deltas, output.finish(pb.FINISH_REASON_LENGTH, 2)


@given(st.data())
def test_indices_have_no_gap_and_texts_join(data):
    tokenizer, _ = parts()
    ids = st.integers(0, tokenizer.get_vocab_size() - 1)
    chunks = data.draw(st.lists(st.lists(ids, max_size=4), min_size=1, max_size=12))
    stops = data.draw(st.lists(st.text("abeé\N{REPLACEMENT CHARACTER}", min_size=1, max_size=2), max_size=2))
    deltas, finish = run(chunks, stops)
    tokens = [i for d in deltas for i in d.token_ids]
    everything = [i for chunk in chunks for i in chunk]
    text = "".join(d.text for d in deltas)
    assert tokens == everything[: len(tokens)]
    index = 0
    for delta in deltas:
        assert delta.index == index
        index += len(delta.token_ids)
    assert finish.usage == pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=len(tokens))
    if finish.matched_stop:
        assert finish.reason == pb.FINISH_REASON_STOP
        assert not any(stop in text for stop in stops)
        assert tokenizer.decode(tokens).startswith(text + finish.matched_stop)
    else:
        assert finish.reason == pb.FINISH_REASON_LENGTH
        assert tokens == everything
        assert text == tokenizer.decode(tokens)


def test_tokens_end_with_the_one_that_completes_the_match():
    tokenizer, _ = parts()
    ids = tokenizer.encode("the plan STOP more").ids
    upto = next(n for n in range(len(ids)) if "STOP" in tokenizer.decode(ids[:n]))
    deltas, finish = run([ids], ["STOP"])
    assert "".join(d.text for d in deltas) == "the plan "
    assert [i for d in deltas for i in d.token_ids] == ids[:upto]
    assert finish.matched_stop == "STOP"
    assert finish.usage.completion_tokens == upto


@pytest.mark.parametrize("stops", [[], ["never"]])
def test_text_that_waits_goes_out_at_the_end(stops):
    ids = parts()[0].encode("neve").ids
    deltas, finish = run([[i] for i in ids], stops)
    assert "".join(d.text for d in deltas) == "neve"
    assert finish.matched_stop == ""
    assert finish.reason == pb.FINISH_REASON_LENGTH
