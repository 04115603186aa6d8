"""Which block holds the keys and values of which token prefix.

Blocks form chains: the key of a block is the 128-bit xxhash of its parent's key and its own tokens, and the
chain starts at a key made from the domain (model revision, adapter, tenant). A key only finds a candidate:
an entry stores its parent entry and its own tokens, and a hit compares both, so a collision costs time and
never content, by induction along the chain.
"""

from dataclasses import dataclass

import xxhash

from baton_wire.columns import TOKEN, Column

_TOKEN_BYTES = TOKEN.itemsize


@dataclass(slots=True, eq=False)
class Entry:
    """A block's content: `tokens` (little-endian int32, one block of them) after the content of `parent`."""

    key: bytes
    parent: "Entry | None"
    tokens: bytes
    block: int


class PrefixIndex:
    """Entries by key, and by block for eviction. Holds no references: the block pool decides what lives."""

    def __init__(self, block_size: int, domain: bytes) -> None:
        self._block_bytes = block_size * _TOKEN_BYTES
        self._root = xxhash.xxh3_128_digest(b"baton prefix\0" + domain)
        self._by_key: dict[bytes, Entry] = {}
        self._by_block: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._by_block)

    def keys(self, tokens: Column) -> list[bytes]:
        """Keys of the whole blocks of `tokens`, int32 [n]; n // block_size of them."""
        data, size, key = tokens.tobytes(), self._block_bytes, self._root
        keys = []
        for start in range(0, len(data) - size + 1, size):
            key = xxhash.xxh3_128_digest(key + data[start : start + size])
            keys.append(key)
        return keys

    def match(self, keys: list[bytes], tokens: Column) -> list[Entry]:
        """The longest indexed prefix: entries of the first blocks of `tokens`, whose keys are `keys`."""
        size, parent = self._block_bytes, None
        found: list[Entry] = []
        data = tokens.tobytes() if keys and keys[0] in self._by_key else b""
        for i, key in enumerate(keys):
            entry = self._by_key.get(key)
            if entry is None or entry.parent is not parent or entry.tokens != data[i * size : (i + 1) * size]:
                break
            found.append(entry)
            parent = entry
        return found

    def next_key(self, parent: Entry | None, tokens: bytes) -> bytes:
        """Key of the block with `tokens` after `parent`."""
        return xxhash.xxh3_128_digest((parent.key if parent else self._root) + tokens)

    def insert(self, key: bytes, parent: Entry | None, tokens: bytes, block: int) -> tuple[Entry, int | None]:
        """Indexes `block` under `key`; returns the entry that now stands for this content.

        Where the same content is indexed already, that entry stays and `block` is not indexed. Where the
        key holds something else (another content, or one whose parent was evicted), the new entry takes its
        place; the block that lost its entry is returned second.
        """
        old = self._by_key.get(key)
        if old is not None and old.parent is parent and old.tokens == tokens:
            return old, None
        entry = Entry(key, parent, tokens, block)
        self._by_key[key] = self._by_block[block] = entry
        if old is None:
            return entry, None
        del self._by_block[old.block]
        return entry, old.block

    def evict(self, block: int) -> None:
        """Forgets the content of `block`."""
        entry = self._by_block.pop(block)
        del self._by_key[entry.key]

    def blocks(self) -> set[int]:
        """All indexed blocks."""
        return set(self._by_block)

    def check_integrity(self) -> None:
        """Asserts that both maps hold the same entries."""
        assert len(self._by_key) == len(self._by_block), "index maps differ in size"
        for block, entry in self._by_block.items():
            assert entry.block == block and self._by_key[entry.key] is entry, f"block {block}: maps disagree"
