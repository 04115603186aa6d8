"""The prefix index: longest exact prefix, never another's content, whatever the hash says."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton_wire.columns import TOKEN
from scheduler_svc.core.prefix_index import PrefixIndex

SIZE = 4
prompts = st.lists(st.integers(0, 2), min_size=0, max_size=24).map(lambda ids: np.array(ids, TOKEN))


def insert(index: PrefixIndex, tokens: np.ndarray, first_block: int) -> None:
    """Indexes all whole blocks of `tokens`, in blocks numbered from `first_block`."""
    parent = None
    for number, key in enumerate(index.keys(tokens)):
        content = tokens[number * SIZE : (number + 1) * SIZE].tobytes()
        parent, _ = index.insert(key, parent, content, first_block + number)


def common_blocks(a: np.ndarray, b: np.ndarray) -> int:
    """Whole blocks that two prompts begin with alike."""
    same = 0
    while (same + 1) * SIZE <= min(len(a), len(b)) and (
        a[: (same + 1) * SIZE] == b[: (same + 1) * SIZE]
    ).all():
        same += 1
    return same


@given(known=st.lists(prompts, max_size=8), wanted=prompts)
def test_match_is_the_longest_common_prefix(known, wanted) -> None:
    index = PrefixIndex(SIZE, b"model")
    for number, tokens in enumerate(known):
        insert(index, tokens, number * 10)
        index.check_integrity()
    found = index.match(index.keys(wanted), wanted)
    assert len(found) == max((common_blocks(tokens, wanted) for tokens in known), default=0)
    content = b"".join(entry.tokens for entry in found)
    assert content == wanted[: len(found) * SIZE].tobytes()


@given(known=st.lists(prompts, min_size=1, max_size=5), wanted=prompts, gone=st.integers(0, 4))
def test_evicting_a_block_cuts_what_was_behind_it(known, wanted, gone) -> None:
    index = PrefixIndex(SIZE, b"model")
    for number, tokens in enumerate(known):
        insert(index, tokens, number * 10)
    found = index.match(index.keys(wanted), wanted)
    if gone < len(found):
        index.evict(found[gone].block)
        index.check_integrity()
        assert index.match(index.keys(wanted), wanted) == found[:gone]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_colliding_keys_cost_hits_never_content(monkeypatch, bits) -> None:
    """With a hash of few bits most keys collide; matches must still be exact by tokens."""

    rng = np.random.default_rng(bits)
    digest, mask = xxhash.xxh3_128_digest, 2**bits - 1
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda data: bytes([digest(data)[0] & mask]))
    index = PrefixIndex(SIZE, b"model")
    content: dict[int, bytes] = {}
    hits = 0
    for number in range(300):
        tokens = rng.integers(0, 2, 3 * SIZE).astype(TOKEN)
        for position, entry in enumerate(index.match(index.keys(tokens), tokens)):
            assert content[entry.block] == tokens[: (position + 1) * SIZE].tobytes()
            hits += 1
        parent = None
        for position, key in enumerate(index.keys(tokens)):
            block = number * 3 + position
            entry, replaced = index.insert(
                key, parent, tokens[position * SIZE : (position + 1) * SIZE].tobytes(), block
            )
            if entry.block == block:
                content[block] = tokens[: (position + 1) * SIZE].tobytes()
            if replaced is not None:
                del content[replaced]
            parent = entry
        index.check_integrity()
    assert hits > 0, "the test must have seen a hit"


def test_domains_do_not_share() -> None:
    tokens = np.arange(SIZE, dtype=TOKEN)
    assert PrefixIndex(SIZE, b"one").keys(tokens) != PrefixIndex(SIZE, b"two").keys(tokens)


def test_a_child_of_an_evicted_parent_is_not_found_under_its_successor() -> None:
    index = PrefixIndex(SIZE, b"model")
    tokens = np.arange(2 * SIZE, dtype=TOKEN)
    insert(index, tokens, 0)
    index.evict(0)
    insert(index, tokens[:SIZE], 7)  # the parent again, in another block
    assert [entry.block for entry in index.match(index.keys(tokens), tokens)] == [7]
    insert(
        index, tokens, 20
    )  # 20 is the known parent's twin and not indexed; 21 takes the stale child's place
    assert [entry.block for entry in index.match(index.keys(tokens), tokens)] == [7, 21]
    index.check_integrity()
