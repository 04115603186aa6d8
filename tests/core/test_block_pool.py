"""The block pool against a plain model of it, operation by operation."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler_svc.core.block_pool import BlockPool

BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """Holders own lists of blocks; the model counts references and remembers what was indexed when."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[int] = []
        self.pool = BlockPool(BLOCKS, self.evicted.append)
        self.holders: list[list[int]] = []
        self.indexed: set[int] = set()
        self.idle_order: list[int] = []  # cached blocks, least recently used first

    def owned(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for blocks in self.holders:
            for block in blocks:
                counts[block] = counts.get(block, 0) + 1
        return counts

    @precondition(lambda self: self.pool.available)
    @rule()
    def take(self) -> None:
        expect_evicted = self.idle_order[:1] if self.pool.available == len(self.idle_order) else []
        self.evicted.clear()
        block = self.pool.take()
        assert self.evicted == expect_evicted, "evicts exactly when nothing is free, oldest first"
        if expect_evicted:
            assert block == expect_evicted[0]
            self.idle_order.pop(0)
            self.indexed.discard(block)
        assert block not in self.owned()
        self.holders.append([block])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share_prefix(self, data) -> None:
        blocks = data.draw(st.sampled_from(self.holders))
        for block in blocks:
            self.pool.share(block)
        self.holders.append(list(blocks))

    @precondition(lambda self: self.idle_order)
    @rule(data=st.data())
    def share_cached(self, data) -> None:
        block = data.draw(st.sampled_from(self.idle_order))
        assert self.pool.idle([block]) == 1
        self.pool.share(block)
        self.idle_order.remove(block)
        self.holders.append([block])

    @precondition(lambda self: len(self.holders) > 1)
    @rule(data=st.data())
    def join(self, data) -> None:
        other = self.holders.pop(data.draw(st.integers(1, len(self.holders) - 1)))
        extra = [block for block in other if block not in self.holders[0]]
        self.pool.release([block for block in other if block in self.holders[0]])
        self.holders[0] += extra

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def index(self, data) -> None:
        block = data.draw(st.sampled_from(sorted(self.owned())))
        self.pool.mark(block)
        self.indexed.add(block)

    @precondition(lambda self: self.indexed)
    @rule(data=st.data())
    def unindex(self, data) -> None:
        block = data.draw(st.sampled_from(sorted(self.indexed)))
        self.pool.unmark(block)
        self.indexed.discard(block)
        if block in self.idle_order:
            self.idle_order.remove(block)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        before = self.pool.freed
        self.pool.release(blocks)
        gone = [block for block in reversed(blocks) if block not in self.owned()]
        self.idle_order += [block for block in gone if block in self.indexed]
        assert self.pool.freed - before == len(gone)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity(self.owned(), self.indexed)
        assert self.pool.referenced == len(self.owned())
        assert self.pool.cached == len(self.idle_order)
        assert self.pool.available == BLOCKS - len(self.owned())


TestPool = PoolMachine.TestCase
