"""However tokens arrive: the texts joined equal decoding the whole, and none holds a part of a character."""

import functools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.frontend.detokenizer import Detokenization
from tests.support.tokenizers_zoo import SPECIAL, ZOO

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@functools.cache
def tokenizer_of(name):
    return ZOO[name]()


@functools.cache
def detokenization_of(name):
    return Detokenization(tokenizer_of(name))


def pieces_of(name, chunks):
    detokenizer = detokenization_of(name).new()
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.finish()]


@pytest.mark.parametrize("name", ZOO)
@given(data=st.data())
def test_pieces_joined_equal_decoding_the_whole(name, data):
    tokenizer = tokenizer_of(name)
    ids = st.integers(0, tokenizer.get_vocab_size() + 3)  # some are unknown
    chunks = data.draw(st.lists(st.lists(ids, max_size=6), max_size=40))
    whole = tokenizer.decode([i for chunk in chunks for i in chunk], skip_special_tokens=True)
    assert "".join(pieces_of(name, chunks)) == whole


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "byte_level_in_sequence"])
@given(data=st.data())
def test_runs_of_bytes(name, data):
    """Random bytes, among them every kind of broken UTF-8, one token each."""
    tokenizer = tokenizer_of(name)
    if name == "sentencepiece":
        byte_ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    else:
        byte_ids = [i for i in range(256) if len(tokenizer.id_to_token(i)) == 1]
    ids = data.draw(st.lists(st.sampled_from(byte_ids), max_size=60))
    assert "".join(pieces_of(name, [[i] for i in ids])) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "byte_level_in_sequence"])
@given(text=st.text())
def test_no_piece_of_proper_text_holds_a_broken_character(name, text):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(text).ids
    pieces = pieces_of(name, [[i] for i in ids])
    assert "".join(pieces) == tokenizer.decode(ids)
    if REPLACEMENT not in tokenizer.decode(ids):
        assert all(REPLACEMENT not in piece for piece in pieces)


def test_text_comes_with_the_token_that_completes_it():
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("é🎷").ids
    assert len(ids) > 2
    pieces = pieces_of("byte_level", [[i] for i in ids])
    assert pieces[-1] == ""
    assert pieces[-2] == "🎷"


@pytest.mark.parametrize("name", ZOO)
def test_special_tokens_have_no_text(name):
    tokenizer = tokenizer_of(name)
    special = tokenizer.token_to_id(SPECIAL)
    assert "".join(pieces_of(name, [[special], [special, special]])) == ""


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_an_unfinished_tail_becomes_replacement_characters(name):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode("🎷").ids[:-1]
    *pushed, tail = pieces_of(name, [[i] for i in ids])
    assert "".join(pushed) == ""
    assert tail == tokenizer.decode(ids)
    assert REPLACEMENT in tail


@pytest.mark.parametrize("name", ZOO)
def test_time_grows_with_tokens_only(name):
    """4,000 tokens of which no text may come for long: a quadratic way takes seconds."""
    tokenizer = tokenizer_of(name)
    start = tokenizer.token_to_id("<0xE2>") if name == "sentencepiece" else 200
    begun = time.perf_counter()
    pieces_of(name, [[start]] * 4_000)
    assert time.perf_counter() - begun < 0.5
