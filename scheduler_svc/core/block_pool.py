"""KV blocks as integers: free, cached or owned; reference counts; least recently used eviction.

Knows nothing of tokens or sequences. Every block is in exactly one state: free (on the free list), cached
(no references, content indexed, in LRU order), or owned (references ≥ 1, indexed or not).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Blocks [0, num_blocks). `on_evict(block)` is called as a cached block loses its content."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_blocks
        self._indexed = bytearray(num_blocks)
        # Grows whenever a block becomes available: tells a blocked request that trying again may help.
        self.freed = 0

    @property
    def available(self) -> int:
        """Blocks that `take` can give: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks without references whose content is kept."""
        return len(self._cached)

    @property
    def referenced(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.available

    def take(self) -> int:
        """A block with one reference; evicts the least recently used cached one where none is free."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._indexed[block] = 0
            self._on_evict(block)
        self._references[block] = 1
        return block

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of these are cached, so that sharing them takes from `available`."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, block: int) -> None:
        """One more reference to an owned or cached block."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each, last block first.

        Last first, so that in LRU order a block never outlives its prefix: whoever used a block used all
        blocks before it, and gave them back later.
        """
        for block in reversed(list(blocks)):
            count = self._references[block] - 1
            assert count >= 0, f"block {block} released more often than shared"
            self._references[block] = count
            if count == 0:
                self.freed += 1
                if self._indexed[block]:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def mark(self, block: int) -> None:
        """The content of this owned block is indexed: keep it when the last reference goes."""
        assert self._references[block] > 0, f"block {block} indexed without an owner"
        self._indexed[block] = 1

    def unmark(self, block: int) -> None:
        """The content of this block is no longer indexed; a cached block becomes free."""
        self._indexed[block] = 0
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def check_integrity(self, owned: dict[int, int], indexed: set[int]) -> None:
        """Asserts the invariants against the references and indexed blocks that the caller counts."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is twice on the free list"
        assert not free & cached, "a block is free and cached"
        for block in range(self.num_blocks):
            count = self._references[block]
            owners = owned.get(block, 0)
            assert count == owners, f"block {block}: {count} references, {owners} owners"
            assert (count == 0) == (block in free or block in cached), (
                f"block {block} lost, or used while free"
            )
            assert bool(self._indexed[block]) == (block in indexed), f"block {block}: index and pool disagree"
            assert block not in free or not self._indexed[block], f"block {block} is free but indexed"
